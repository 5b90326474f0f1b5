-- $1 device ids, each once. Active installations only.
SELECT device_id, identity_public_key FROM installations WHERE device_id = ANY ($1::uuid[]) AND state = 1
