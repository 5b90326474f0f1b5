-- Hand wake-ups to a dispatcher. In: $1 session, and an element a lane: $2 app, $3 platform, $4 how many at the most.
-- Out: the wake-ups, now leased to the session.
WITH lanes AS (
    SELECT * FROM unnest($2::text[], $3::int2[], $4::int4[]) AS t (app_id, platform, most)
), due AS MATERIALIZED (
    SELECT o.device_id, o.message_id
    FROM lanes l CROSS JOIN LATERAL (
        SELECT device_id, message_id FROM open_deliveries
        WHERE app_id = l.app_id AND platform = l.platform AND session_id IS NULL AND next_attempt_at <= now()
          -- Nothing to look up by.
          AND (closes_at > now()) IS TRUE
        ORDER BY priority DESC, next_attempt_at
        LIMIT l.most
        FOR UPDATE SKIP LOCKED
    ) o
)
UPDATE open_deliveries o SET session_id = $1, fence = o.fence + 1
FROM due WHERE o.device_id = ANY (ARRAY[due.device_id]) AND o.message_id = due.message_id
RETURNING o.message_id, o.device_id, o.wake_up_id, o.fence, o.app_id, o.platform, o.priority, o.muted, o.expires_at, o.attempts,
          o.expires_at - now()
