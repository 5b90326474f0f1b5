-- $1 subscriber id, $2 hash of the PIN: not a lock that was set meanwhile.
DELETE FROM registration_locks WHERE subscriber_id = $1 AND pin_hash = $2
