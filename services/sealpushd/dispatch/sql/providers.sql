-- The credentials that are in use.
SELECT provider_id, app_id, platform, kind, settings::text AS settings, secret, secret_file, version, expires_at, created_at, updated_at
FROM providers WHERE deleted_at IS NULL ORDER BY app_id, platform
