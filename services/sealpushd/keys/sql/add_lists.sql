-- Starts the lists that do not exist, sorted. In, an element a subscriber: $1 subscriber, $2 start of its chain. Out: nothing.
INSERT INTO device_lists (subscriber_id, seq, head)
SELECT subscriber_id, 0, head FROM unnest($1::uuid[], $2::bytea[]) AS t (subscriber_id, head)
ORDER BY subscriber_id
ON CONFLICT DO NOTHING
