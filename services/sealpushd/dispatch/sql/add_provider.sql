-- $1 id, $2 app, $3 platform, $4 kind, $5 settings, $6 encrypted secret, $7 file of the secret, $8 end, $9 now.
-- No row: the lane has a credential already.
INSERT INTO providers (provider_id, app_id, platform, kind, settings, secret, secret_file, expires_at, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5::text::jsonb, $6, $7, $8, $9, $9)
ON CONFLICT (app_id, platform) WHERE deleted_at IS NULL DO NOTHING
RETURNING version
