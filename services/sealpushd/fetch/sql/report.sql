-- What became of wake-ups, whose deliveries this transaction has locked. A report with another session or fence than the lease's changes nothing.
-- In: $1 session; an element a report: $2 message, $3 device, $4 fence, $5 outcome (1 pushed, 2 retry, 3 token gone, 4 quarantined,
--   5 released), $6 retry at, $7 reason, $8 detail, $9 retry in (null: see $6); $10 the longest time until the next try.
-- A time to try that lies further ahead than the longest is of a clock that is wrong, and counts as now.
-- What a dead token ends was given its grace before this (`grace`): a lease without a time to push is one that was taken off the queue
-- meanwhile, by this report's grace or by that of another delivery of the device. It stays off and keeps the reason, whatever became of it.
WITH given AS (
    SELECT * FROM unnest($2::uuid[], $3::uuid[], $4::int8[], $5::int2[], $6::timestamptz[], $7::int2[], $8::text[], $9::interval[])
        AS t (message_id, device_id, fence, outcome, retry_at, reason, detail, retry_in)
), held AS MATERIALIZED (
    SELECT g.*, o.next_attempt_at IS NULL AS off
    FROM given g
    JOIN open_deliveries o ON o.device_id = ANY (ARRAY[g.device_id]) AND o.message_id = g.message_id
    -- Not by the session's index, which looks cheap when statistics were taken while nothing was leased.
    WHERE o.session_id IS NOT DISTINCT FROM $1 AND o.fence = g.fence
), released AS (
    UPDATE open_deliveries o SET
        session_id = NULL,
        attempts = o.attempts + CASE WHEN l.outcome = 5 THEN 0 ELSE 1 END,
        next_attempt_at = CASE WHEN l.outcome IN (2, 5) AND NOT l.off THEN CASE
            WHEN l.retry_in IS NOT NULL THEN now() + l.retry_in
            WHEN l.retry_at <= now() + $10::interval THEN l.retry_at
            ELSE now()
        END END,
        -- Without a token, or for any other reason than that pushing failed, there is nothing to requeue.
        quarantined = l.outcome = 4 AND l.reason IN (0, 110) AND NOT l.off
    FROM held l WHERE o.device_id = ANY (ARRAY[l.device_id]) AND o.message_id = l.message_id
    RETURNING o.device_id, o.message_id
), pushed AS (
    UPDATE deliveries d SET
        state = CASE WHEN l.outcome = 1 AND d.state = 1 THEN 2 ELSE d.state END,
        changed_at = CASE WHEN l.outcome = 1 AND d.state = 1 THEN now() ELSE d.changed_at END,
        pushed_at = CASE WHEN l.outcome = 1 THEN coalesce(d.pushed_at, now()) ELSE d.pushed_at END,
        attempts = d.attempts + CASE WHEN l.outcome = 5 THEN 0 ELSE 1 END,
        push_reason = CASE
            WHEN l.off THEN d.push_reason
            WHEN l.outcome = 1 THEN 0
            -- A grace was not given: the device has fetched it, and is alive without a token.
            WHEN l.outcome = 3 THEN 111
            WHEN l.outcome = 4 THEN coalesce(nullif(l.reason, 0), 110)
            ELSE l.reason
        END,
        detail = nullif(l.detail, '')
    FROM held l WHERE d.message_id = ANY (ARRAY[l.message_id]) AND d.device_id = l.device_id
    RETURNING d.message_id, d.device_id, d.state = 2 AND d.changed_at = now() AS changed
)
INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, state, reason)
SELECT p.message_id, p.device_id, m.sender_id, m.order_id, m.leg_no, m.group_id, m.channel, 2, 0
FROM pushed p JOIN messages m ON m.message_id = ANY (ARRAY[p.message_id]) WHERE p.changed
