-- $1 subscriber id. Its lock goes when no installation is left that could set or use it.
DELETE FROM registration_locks
WHERE subscriber_id = $1 AND NOT EXISTS (SELECT 1 FROM installations WHERE subscriber_id = $1 AND state = 1)
