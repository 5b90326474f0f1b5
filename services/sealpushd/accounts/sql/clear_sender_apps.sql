-- $1 sender id.
DELETE FROM sender_apps WHERE sender_id = $1
