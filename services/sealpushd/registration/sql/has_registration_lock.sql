-- $1 device id. Whether the subscriber of an active installation has set a lock; no row: it has ended.
SELECT EXISTS (SELECT 1 FROM registration_locks l WHERE l.subscriber_id = d.subscriber_id) AS has_lock
FROM installations d
WHERE d.device_id = $1 AND d.state = 1
