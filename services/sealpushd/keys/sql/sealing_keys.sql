-- What sealing needs of devices: their current signed prekeys. The hot one. In: $1 device ids.
SELECT p.device_id, d.subscriber_id, d.added_at, p.suite, p.prekey_id, p.public_key, p.expires_at_ms
FROM signed_prekeys p JOIN devices d USING (device_id)
WHERE p.device_id = ANY ($1::uuid[]) AND p.is_current AND (d.removed_at IS NULL) IS TRUE
