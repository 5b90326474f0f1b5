-- Deliveries that were given up for push, which this transaction has locked, are pushed again. The count of tries in `deliveries` is history
-- and stays. In: $1 devices, $2 messages.
WITH given AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[]) AS t (device_id, message_id)
), queued AS (
    UPDATE open_deliveries o SET quarantined = false, attempts = 0, next_attempt_at = now()
    FROM given g WHERE o.device_id = ANY (ARRAY[g.device_id]) AND o.message_id = g.message_id
)
UPDATE deliveries d SET push_reason = 0, detail = NULL
FROM given g WHERE d.message_id = ANY (ARRAY[g.message_id]) AND d.device_id = g.device_id
