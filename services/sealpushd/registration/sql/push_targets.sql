-- $1 device ids, each once. Ended installations have no token. Unknown ones are left out.
SELECT device_id, push_token, push_environment, push_topic, token_registered_at, platform, app_id
FROM installations
WHERE device_id = ANY ($1::uuid[])
