-- $1 subscriber id. Every installation it has or had.
SELECT device_id, state, last_seen_at FROM (SELECT * FROM installations WHERE subscriber_id = $1 OFFSET 0) i ORDER BY device_id
