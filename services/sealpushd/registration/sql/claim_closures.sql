-- $1 now, $2 rows at most, $3 seconds between attempts at the most. Takes those that are due; one that is not done comes again, later
-- each time. One that is due later than any can be was put by a clock that was ahead, and is due now.
WITH due AS (
    SELECT closure_id FROM pending_closures WHERE next_attempt_at <= $1 OR next_attempt_at > $1::timestamptz + make_interval(secs => $3::double precision)
    ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE pending_closures c
SET attempts = c.attempts + 1,
    next_attempt_at = $1::timestamptz + make_interval(secs => least(2.0 ^ least(c.attempts, 16), $3::double precision))
FROM due
WHERE c.closure_id = ANY (ARRAY[due.closure_id])
RETURNING c.closure_id, c.kind, c.subscriber_id, c.device_id, c.sender_id, c.reason_code, c.advertising_only
