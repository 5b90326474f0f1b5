-- $1 app, $2 platform, $3 now. The secret is forgotten, that there was one is not. No row: there was none.
UPDATE providers SET deleted_at = $3, updated_at = $3, version = version + 1, secret = CASE WHEN secret_file IS NULL THEN ''::bytea END
WHERE app_id = $1 AND platform = $2 AND deleted_at IS NULL
RETURNING version
