-- Puts devices into the lists of these subscribers.
-- In, an element a device: $1 device, $2 subscriber; $3 now; $4 those of them that nobody vouches for. Out: nothing.
UPDATE devices d SET subscriber_id = t.subscriber_id, added_at = $3::timestamptz, removed_at = NULL, recovered = d.device_id = ANY ($4::uuid[])
FROM unnest($1::uuid[], $2::uuid[]) AS t (device_id, subscriber_id)
WHERE d.device_id = ANY (ARRAY[t.device_id])
