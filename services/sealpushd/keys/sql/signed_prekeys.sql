-- All signed prekeys of devices, the current ones and those before, with the devices they belong to. In: $1 device ids.
SELECT p.device_id, d.subscriber_id, d.identity_public_key, d.min_suite, d.added_at, d.recovered, p.is_current, p.suite, p.prekey_id,
       p.public_key, p.created_at_ms, p.expires_at_ms, p.signature, p.superseded_at
-- OFFSET 0 keeps each device a look-up of its own: a table without statistics looks cheap to read whole.
FROM signed_prekeys p CROSS JOIN LATERAL (SELECT * FROM devices WHERE device_id = p.device_id OFFSET 0) d
WHERE p.device_id = ANY ($1::uuid[]) AND d.removed_at IS NULL
