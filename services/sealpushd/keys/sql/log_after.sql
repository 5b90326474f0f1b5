-- The end of a subscriber's device log and the entries after some number, in one view of it.
-- In: $1 subscriber, $2 the number, $3 how many at the most. Out: a row an entry, oldest first; one without an entry where there are none.
SELECT l.seq, l.head, e.entry
FROM device_lists l
LEFT JOIN LATERAL (
    SELECT seq, entry FROM device_log WHERE subscriber_id = l.subscriber_id AND seq > $2::int8 ORDER BY seq LIMIT $3::int8
) e ON true
WHERE l.subscriber_id = $1
ORDER BY e.seq
