-- $1 uuid if it is new, $2 app id, $3 name, $4 root, $5 now. No row: senders hold entries of its present root.
INSERT INTO apps (app_uuid, app_id, name, root_public_key, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $5)
ON CONFLICT (app_id) DO UPDATE
SET name = excluded.name, root_public_key = excluded.root_public_key,
    version = apps.version + 1, updated_at = excluded.updated_at, deleted_at = NULL
WHERE apps.root_public_key = excluded.root_public_key
   OR NOT EXISTS (SELECT 1 FROM sender_apps s WHERE s.app_id = excluded.app_id)
RETURNING version
