-- $1 sender id, $2 app ids in their order.
INSERT INTO sender_apps (sender_id, app_id, position)
SELECT $1, app_id, position FROM unnest($2::text[]) WITH ORDINALITY AS a (app_id, position)
