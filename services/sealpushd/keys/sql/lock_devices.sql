-- Devices, locked in the order of their ids. In: $1 device ids.
SELECT device_id, subscriber_id, identity_public_key, min_suite, removed_at IS NOT NULL AS removed
FROM devices WHERE device_id = ANY ($1::uuid[])
ORDER BY device_id
FOR NO KEY UPDATE
