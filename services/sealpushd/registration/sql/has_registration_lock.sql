-- $1 device id. Whether its subscriber has set a lock.
SELECT 1
FROM installations d
JOIN registration_locks l ON l.subscriber_id = d.subscriber_id
WHERE d.device_id = $1
