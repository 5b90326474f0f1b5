-- $1 subscriber id, $2 wrong PINs so far, $3 when the last was tried.
UPDATE registration_locks SET wrong_pins = $2, last_wrong_at = $3 WHERE subscriber_id = $1
