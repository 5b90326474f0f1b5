-- $1 subscriber id. Every installation it has or had.
SELECT device_id, state, last_seen_at FROM installations WHERE subscriber_id = $1 ORDER BY device_id
