-- $1 app ids. Unknown and deleted ones are left out.
SELECT app_id, name, root_public_key FROM apps WHERE app_id = ANY ($1::text[]) AND deleted_at IS NULL
