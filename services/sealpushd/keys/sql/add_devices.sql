-- Makes the rows of devices that are not known, as if removed, for `lock_devices` to find. Sorted, so that batches cannot deadlock.
-- In, an element a device: $1 device, $2 subscriber, $3 identity key; $4 now. Out: those made.
INSERT INTO devices (device_id, subscriber_id, identity_public_key, added_at, removed_at)
SELECT device_id, subscriber_id, identity_public_key, $4::timestamptz, $4::timestamptz
FROM unnest($1::uuid[], $2::uuid[], $3::bytea[]) AS t (device_id, subscriber_id, identity_public_key)
ORDER BY device_id
ON CONFLICT DO NOTHING
RETURNING device_id
