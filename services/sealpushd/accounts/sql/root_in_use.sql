-- $1 root public key. A row when at least one app pins it.
SELECT 1 FROM apps WHERE root_public_key = $1 AND deleted_at IS NULL LIMIT 1
