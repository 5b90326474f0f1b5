-- In: $1 sessions that are gone.
DELETE FROM wake_up_sessions WHERE session_id = ANY ($1::uuid[])
