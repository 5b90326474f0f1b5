-- Moves stocks of one-time prekeys on. The blob is written only where nothing is left in it. The caller has locked the devices.
-- In, an element a stock: $1 device, $2 suite, $3 index of the next key, $4 whether nothing is left. Out: nothing.
UPDATE one_time_prekeys o
SET next_index = t.next_index,
    first_index = CASE WHEN t.used_up THEN t.next_index ELSE o.first_index END,
    blob = CASE WHEN t.used_up THEN ''::bytea ELSE o.blob END
FROM unnest($1::uuid[], $2::int2[], $3::int8[], $4::bool[]) AS t (device_id, suite, next_index, used_up)
WHERE o.device_id = ANY (ARRAY[t.device_id]) AND o.suite = t.suite
