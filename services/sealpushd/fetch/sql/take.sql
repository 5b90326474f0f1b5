-- Devices take deliveries, which this transaction has locked: they become FETCHED and are returned, oldest first.
-- In: $1 numbers of the questions, $2 devices, $3 messages; $4 whether to return the contents.
WITH asked AS (
    SELECT * FROM unnest($1::int4[], $2::uuid[], $3::uuid[]) AS t (question, device_id, message_id)
), taken AS (
    -- A device that asks is alive, if without a token.
    UPDATE deliveries d SET
        state = 3, changed_at = now(), fetched_at = now(), push_reason = CASE d.push_reason WHEN 105 THEN 111 ELSE d.push_reason END
    FROM (SELECT DISTINCT device_id, message_id FROM asked) a
    WHERE d.message_id = ANY (ARRAY[a.message_id]) AND d.device_id = a.device_id AND d.state < 3
    RETURNING d.message_id, d.device_id
), alive AS (
    -- It took what it could not be pushed: the grace after its token's death is over, its lifetime counts again.
    UPDATE open_deliveries o SET closes_at = o.expires_at, close_reason = 102
    FROM (SELECT DISTINCT device_id, message_id FROM asked) a
    WHERE o.device_id = ANY (ARRAY[a.device_id]) AND o.message_id = a.message_id AND o.close_reason = 105
), journal AS (
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, state, reason)
    SELECT t.message_id, t.device_id, m.sender_id, m.order_id, m.leg_no, m.group_id, m.channel, 3, 0
    FROM taken t JOIN messages m ON m.message_id = ANY (ARRAY[t.message_id])
)
SELECT a.question, o.device_id, o.message_id, o.wake_up_id, o.priority, o.content_class, o.muted, o.expires_at, m.created_at,
       c.head, d.stanza, c.tail
FROM asked a
JOIN open_deliveries o ON o.device_id = ANY (ARRAY[a.device_id]) AND o.message_id = a.message_id
JOIN messages m ON m.message_id = ANY (ARRAY[a.message_id])
LEFT JOIN contents c ON $4 AND c.message_id = ANY (ARRAY[a.message_id])
LEFT JOIN deliveries d ON $4 AND d.message_id = ANY (ARRAY[a.message_id]) AND d.device_id = a.device_id
ORDER BY a.question, a.message_id
