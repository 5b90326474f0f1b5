-- $1 subscriber id, $2 hash of the PIN, $3 now. A new PIN begins with all its attempts.
INSERT INTO registration_locks (subscriber_id, pin_hash, set_at) VALUES ($1, $2, $3)
ON CONFLICT (subscriber_id) DO UPDATE
SET pin_hash = excluded.pin_hash, set_at = excluded.set_at, wrong_pins = 0, last_wrong_at = NULL
