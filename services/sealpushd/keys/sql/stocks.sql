-- One-time prekeys of devices in one suite each: a window from the next one to hand out, since a whole stock takes up to 260 kB.
-- In, an element a device: $1 device, $2 suite, $3 bytes of a record, $4 records to read. Out: also whether there are more.
SELECT o.device_id, o.suite, o.next_index,
       substr(o.blob, s.start + 1, t.record_bytes * t.records) AS blob,
       octet_length(o.blob) > s.start + t.record_bytes * t.records AS more
FROM unnest($1::uuid[], $2::int2[], $3::int4[], $4::int4[]) AS t (device_id, suite, record_bytes, records)
JOIN one_time_prekeys o ON o.device_id = ANY (ARRAY[t.device_id]) AND o.suite = t.suite
CROSS JOIN LATERAL (SELECT ((o.next_index - o.first_index) * t.record_bytes)::int4 AS start) s
