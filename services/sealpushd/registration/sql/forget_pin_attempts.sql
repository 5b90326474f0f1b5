-- $1 subscriber id, $2 hash of the PIN that was given: nothing of a lock that was set meanwhile.
UPDATE registration_locks SET wrong_pins = 0, last_wrong_at = NULL WHERE subscriber_id = $1 AND pin_hash = $2
