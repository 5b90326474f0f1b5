-- $1 registration id, $2 now, $3 no code made until now can honestly end later. Takes an attempt before the code is compared, so that
-- parallel guesses are counted. A used one can be repeated after its expiry. No row: unknown, expired or used up.
UPDATE registrations SET attempts_left = attempts_left - 1, expires_at = least(expires_at, $3)
WHERE registration_id = $1 AND attempts_left > 0 AND (expires_at > $2 OR used_at IS NOT NULL)
RETURNING app_id, phone_lookup, phone, code_hash, attempts_left, new_subscriber_id, used_at IS NOT NULL AS is_used
