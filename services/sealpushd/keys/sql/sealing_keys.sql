-- What sealing needs of devices: their current signed prekeys. The hot one. In: $1 device ids.
SELECT p.device_id, d.subscriber_id, d.added_at, p.suite, p.prekey_id, p.public_key, p.expires_at_ms
-- OFFSET 0 keeps each device a look-up of its own: a table without statistics looks cheap to read whole.
FROM signed_prekeys p CROSS JOIN LATERAL (SELECT * FROM devices WHERE device_id = p.device_id OFFSET 0) d
WHERE p.device_id = ANY ($1::uuid[]) AND p.is_current AND d.removed_at IS NULL
