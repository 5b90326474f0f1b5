-- Appends to logs and moves their ends, which the caller has locked.
-- In, an element an entry: $1 subscriber, $2 seq, $3 entry, $4 hash.
-- In, an element a list:   $5 subscriber, $6 seq, $7 head, $8 whether a device was added; $9 now. Out: nothing.
WITH appended AS (
    INSERT INTO device_log (subscriber_id, seq, entry, hash)
    SELECT * FROM unnest($1::uuid[], $2::int8[], $3::bytea[], $4::bytea[])
)
UPDATE device_lists l
SET seq = t.seq, head = t.head, identity_changed_at = CASE WHEN t.added THEN $9::timestamptz ELSE l.identity_changed_at END
FROM unnest($5::uuid[], $6::int8[], $7::bytea[], $8::bool[]) AS t (subscriber_id, seq, head, added)
WHERE l.subscriber_id = ANY (ARRAY[t.subscriber_id])
