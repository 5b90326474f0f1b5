-- $1 id, $2 the version that was read, $3 kind, $4 settings, $5 encrypted secret, $6 file of the secret, $7 end, $8 now.
-- No row: somebody changed or removed it meanwhile.
UPDATE providers SET kind = $3, settings = $4::text::jsonb, secret = $5, secret_file = $6, expires_at = $7, version = version + 1, updated_at = $8
WHERE provider_id = $1 AND version = $2 AND deleted_at IS NULL
RETURNING version
