-- Those of the devices that have one-time prekeys, locked in the order of their ids; others are left in peace. In: $1 device ids.
SELECT d.device_id, d.min_suite
FROM devices d
WHERE d.device_id = ANY ($1::uuid[]) AND d.removed_at IS NULL
      AND EXISTS (SELECT FROM one_time_prekeys o WHERE o.device_id = ANY (ARRAY[d.device_id]) AND octet_length(o.blob) > 0)
ORDER BY d.device_id
FOR NO KEY UPDATE OF d
