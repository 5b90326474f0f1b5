-- $1 device id, $2 counter, $3 now; then what changes, NULL: stays: $4 platform, $5 environment, $6 topic, $7 whether the token
-- changes, $8 token or NULL, $9 its hash or NULL, $10 allowed by the system, $11 allowed by the app, $12 primary, $13 subscriptions,
-- $14 app version, $15 locale.
-- No row: the counter was used, or the installation has ended.
UPDATE installations
SET change_counter = $2, updated_at = $3, last_seen_at = $3,
    platform = COALESCE($4, platform), push_environment = COALESCE($5, push_environment), push_topic = COALESCE($6, push_topic),
    push_token = CASE WHEN $7::boolean THEN $8::bytea ELSE push_token END,
    push_token_lookup = CASE WHEN $7::boolean THEN $9::bytea ELSE push_token_lookup END,
    token_registered_at = CASE WHEN NOT $7::boolean THEN token_registered_at WHEN $9::bytea IS NULL THEN NULL ELSE $3 END,
    -- An app that speaks of its token is installed, also when it says that it has none.
    token_gone_at = CASE WHEN $7::boolean THEN NULL ELSE token_gone_at END,
    push_allowed_by_os = COALESCE($10, push_allowed_by_os), push_allowed_by_app = COALESCE($11, push_allowed_by_app),
    is_primary = COALESCE($12, is_primary), subscriptions = COALESCE($13::text[], subscriptions),
    app_version = COALESCE($14, app_version), locale = COALESCE($15, locale)
WHERE device_id = $1 AND state = 1 AND change_counter < $2
RETURNING subscriber_id, app_id
