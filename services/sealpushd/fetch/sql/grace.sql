-- Deliveries of devices whose token is dead, which this transaction has locked, end after a grace and are not pushed any more. What the
-- device has fetched is left alone: it is alive, whatever its token. A dispatcher that holds one keeps it until it reports.
-- In: $1 devices, $2 messages, $3 the grace.
WITH unfetched AS MATERIALIZED (
    SELECT d.device_id, d.message_id
    FROM unnest($1::uuid[], $2::uuid[]) AS g (device_id, message_id)
    JOIN deliveries d ON d.message_id = ANY (ARRAY[g.message_id]) AND d.device_id = g.device_id
    WHERE d.state < 3
), closing AS (
    UPDATE open_deliveries o SET
        closes_at = least(o.closes_at, now() + $3::interval),
        close_reason = CASE WHEN now() + $3::interval < o.closes_at THEN 105 ELSE o.close_reason END,
        next_attempt_at = NULL,
        quarantined = false
    FROM unfetched u WHERE o.device_id = ANY (ARRAY[u.device_id]) AND o.message_id = u.message_id
)
UPDATE deliveries d SET push_reason = 105
FROM unfetched u WHERE d.message_id = ANY (ARRAY[u.message_id]) AND d.device_id = u.device_id
