-- $1 device id, $2 subscriber id, $3 app id, $4 platform, $5 environment, $6 topic, $7 token or NULL, $8 its hash or NULL,
-- $9 allowed by the system, $10 allowed by the app, $11 held, $12 primary, $13 subscriptions, $14 app version, $15 locale,
-- $16 identity key, $17 registration id, $18 now.
-- Counter and challenge time of a known device go on. No row: the device id belongs to another identity key.
INSERT INTO installations (device_id, subscriber_id, app_id, platform, push_environment, push_topic, push_token, push_token_lookup,
                           token_registered_at, push_allowed_by_os, push_allowed_by_app, state, held, is_primary, subscriptions,
                           app_version, locale, identity_public_key, registration_id, created_at, updated_at, last_seen_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, CASE WHEN $8::bytea IS NULL THEN NULL ELSE $18::timestamptz END, $9, $10, 1, $11, $12, $13,
        $14, $15, $16, $17, $18, $18, $18)
ON CONFLICT (device_id) DO UPDATE
SET subscriber_id = excluded.subscriber_id, app_id = excluded.app_id, platform = excluded.platform,
    push_environment = excluded.push_environment, push_topic = excluded.push_topic, push_token = excluded.push_token,
    push_token_lookup = excluded.push_token_lookup, token_registered_at = excluded.token_registered_at, token_gone_at = NULL,
    push_allowed_by_os = excluded.push_allowed_by_os, push_allowed_by_app = excluded.push_allowed_by_app, state = 1,
    held = installations.held OR excluded.held, is_primary = excluded.is_primary, subscriptions = excluded.subscriptions,
    app_version = excluded.app_version, locale = excluded.locale, registration_id = excluded.registration_id,
    updated_at = excluded.updated_at, last_seen_at = excluded.last_seen_at
WHERE installations.identity_public_key = excluded.identity_public_key
RETURNING device_id
