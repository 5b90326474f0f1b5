-- A subscriber's device log, oldest entry first. In: $1 subscriber id.
SELECT entry FROM device_log WHERE subscriber_id = $1 ORDER BY seq
