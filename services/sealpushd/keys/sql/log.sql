-- A subscriber's device log, oldest entry first. In: $1 subscriber id.
SELECT seq, entry, hash FROM device_log WHERE subscriber_id = $1 ORDER BY seq
