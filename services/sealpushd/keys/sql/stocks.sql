-- One-time prekeys of devices in one suite each. In, an element a device: $1 device, $2 suite.
SELECT o.device_id, o.suite, o.first_index, o.next_index, o.blob
FROM unnest($1::uuid[], $2::int2[]) AS t (device_id, suite)
JOIN one_time_prekeys o USING (device_id, suite)
