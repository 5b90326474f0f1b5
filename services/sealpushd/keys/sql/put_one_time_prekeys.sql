-- Replaces the one-time prekeys of a device in one suite. The caller has locked the device.
-- In: $1 device, $2 suite, $3 index of the first and of the next key, $4 blob. Out: nothing.
INSERT INTO one_time_prekeys (device_id, suite, first_index, next_index, blob) VALUES ($1, $2, $3, $3, $4)
ON CONFLICT (device_id, suite) DO UPDATE
SET first_index = excluded.first_index, next_index = excluded.next_index, blob = excluded.blob
