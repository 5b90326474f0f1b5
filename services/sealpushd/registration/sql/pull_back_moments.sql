-- $1 subscriber id, $2 now, $3 the latest moment that is possible now. What lies later was written by a clock that was ahead, and counts from
-- now on: otherwise a lock, or a number's being in use, would last until the present has come so far.
WITH locks AS (
    UPDATE registration_locks SET last_wrong_at = $2 WHERE subscriber_id = $1 AND last_wrong_at > $3
)
UPDATE installations SET last_seen_at = $2 WHERE subscriber_id = $1 AND last_seen_at > $3
