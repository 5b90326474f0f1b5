-- Sessions whose leases nobody holds any more. In: $1 how long a session may be unseen. Out: their ids. One that was seen in the future
-- was seen before the clock was set back, and is there again with its next heartbeat if it lives.
SELECT session_id FROM wake_up_sessions WHERE seen_at < now() - $1::interval OR seen_at > now() + $1::interval
UNION
-- The session ended, and a claim that was cancelled with it committed afterwards all the same.
SELECT o.session_id FROM open_deliveries o
WHERE o.session_id IS NOT NULL AND NOT EXISTS (SELECT FROM wake_up_sessions s WHERE s.session_id = o.session_id)
