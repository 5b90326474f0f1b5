-- $1 subscriber id. Its lock, kept from others until the transaction ends.
SELECT subscriber_id, pin_hash, wrong_pins, last_wrong_at FROM registration_locks WHERE subscriber_id = $1 FOR UPDATE
