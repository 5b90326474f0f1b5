-- From now on these devices accept no lower suite; what they signed for a lower one goes. The caller has locked the devices.
-- In, an element a device: $1 device, $2 lowest suite. Out: nothing.
WITH handed_out AS (
    DELETE FROM handouts WHERE device_id = ANY ($1::uuid[])
), stocks AS (
    UPDATE one_time_prekeys SET first_index = next_index, blob = '' WHERE device_id = ANY ($1::uuid[])
)
UPDATE devices d SET min_suite = t.min_suite
FROM unnest($1::uuid[], $2::int2[]) AS t (device_id, min_suite)
WHERE d.device_id = ANY (ARRAY[t.device_id])
