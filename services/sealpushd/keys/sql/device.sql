-- One device. In: $1 device id.
SELECT device_id, subscriber_id, identity_public_key, min_suite, removed_at IS NOT NULL AS removed FROM devices WHERE device_id = $1
