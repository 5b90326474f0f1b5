-- Devices take deliveries: what is open and asked for becomes FETCHED and is returned, oldest first.
-- In, an element a question: $1 its number, $2 device, $3 wake-up id (or null), $4 message id (or null), $5 only after this message id,
--   $6 how many at the most. $7: whether to return the contents.
WITH given AS (
    SELECT * FROM unnest($1::int4[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::int4[])
        AS t (question, device_id, wake_up_id, message_id, after_id, most)
), asked AS MATERIALIZED (
    SELECT g.question, o.device_id, o.message_id
    FROM given g CROSS JOIN LATERAL (
        SELECT o.device_id, o.message_id FROM open_deliveries o
        WHERE o.device_id = g.device_id AND o.message_id > g.after_id AND o.expires_at > now()
          AND (g.wake_up_id IS NULL OR o.wake_up_id = g.wake_up_id)
          AND (g.message_id IS NULL OR o.message_id = g.message_id)
        ORDER BY o.message_id LIMIT g.most
    ) o
), locked AS MATERIALIZED (
    -- Who cancels or acknowledges locks the same rows first, so what is returned here was open when it was taken.
    SELECT o.device_id, o.message_id, o.wake_up_id, o.priority, o.content_class, o.muted, o.expires_at
    FROM (SELECT DISTINCT device_id, message_id FROM asked) a
    JOIN open_deliveries o ON o.device_id = a.device_id AND o.message_id = a.message_id
    ORDER BY o.device_id, o.message_id
    FOR UPDATE OF o
), taken AS (
    UPDATE deliveries d SET state = 3, changed_at = now(), fetched_at = now()
    FROM locked l WHERE d.message_id = l.message_id AND d.device_id = l.device_id AND d.state < 3
    RETURNING d.message_id, d.device_id
), journal AS (
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, state, reason)
    SELECT t.message_id, t.device_id, m.sender_id, m.order_id, m.leg_no, m.group_id, m.channel, 3, 0
    FROM taken t JOIN messages m ON m.message_id = t.message_id
)
SELECT a.question, l.device_id, l.message_id, l.wake_up_id, l.priority, l.content_class, l.muted, l.expires_at, m.created_at,
       c.head, d.stanza, c.tail
FROM asked a
JOIN locked l ON l.device_id = a.device_id AND l.message_id = a.message_id
JOIN messages m ON m.message_id = l.message_id
LEFT JOIN contents c ON $7 AND c.message_id = l.message_id
LEFT JOIN deliveries d ON $7 AND d.message_id = l.message_id AND d.device_id = l.device_id
ORDER BY a.question, l.message_id
