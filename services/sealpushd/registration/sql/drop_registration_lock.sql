-- $1 subscriber id.
DELETE FROM registration_locks WHERE subscriber_id = $1
