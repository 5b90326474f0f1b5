-- $1 device ids, each once. Ended installations have no token. Unknown ones are left out.
-- The order of the columns is the order of store.PushTarget.
SELECT device_id, push_token, push_environment, push_topic, token_registered_at, platform, app_id, state = 1 AND token_gone_at IS NOT NULL
FROM installations
WHERE device_id = ANY ($1::uuid[])
