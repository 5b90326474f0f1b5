-- What is to be pushed later than can be was put there by a clock that was ahead, and is due now. In: $1 the longest time until a try.
-- Read from the index of what can be claimed, as the counts of `queues` are.
UPDATE open_deliveries o SET next_attempt_at = now()
FROM (
    SELECT device_id, message_id FROM open_deliveries
    WHERE next_attempt_at > now() + $1::interval AND session_id IS NULL
    FOR UPDATE SKIP LOCKED
) late
WHERE o.device_id = ANY (ARRAY[late.device_id]) AND o.message_id = late.message_id
