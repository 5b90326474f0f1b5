-- Find and lock what devices ask for, in the order of `lock_keys`.
-- In, an element a question: $1 its number, $2 device, $3 wake-up id (or null), $4 message id (or null), $5 only after this message id,
--   $6 how many at the most, $7 how many bytes a question at the most (one delivery always fits). Out: question, device, message.
WITH asked AS MATERIALIZED (
    SELECT g.question, o.device_id, o.message_id,
           sum(o.bytes) OVER (PARTITION BY g.question ORDER BY o.message_id) - o.bytes AS bytes_before
    FROM unnest($1::int4[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::int4[])
        AS g (question, device_id, wake_up_id, message_id, after_id, most)
    CROSS JOIN LATERAL (
        SELECT o.device_id, o.message_id, o.bytes FROM open_deliveries o
        WHERE o.device_id = ANY (ARRAY[g.device_id]) AND o.message_id > g.after_id AND o.expires_at > now()
          AND (g.wake_up_id IS NULL OR o.wake_up_id = g.wake_up_id)
          AND (g.message_id IS NULL OR o.message_id = g.message_id)
        ORDER BY o.message_id LIMIT g.most
    ) o
)
SELECT a.question, a.device_id, a.message_id
FROM asked a JOIN open_deliveries o ON o.device_id = ANY (ARRAY[a.device_id]) AND o.message_id = a.message_id
WHERE a.bytes_before < $7
ORDER BY a.device_id, a.message_id
FOR UPDATE OF o
