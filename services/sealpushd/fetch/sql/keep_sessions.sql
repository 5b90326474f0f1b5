-- Dispatchers that are connected now. In: $1 sessions.
INSERT INTO wake_up_sessions (session_id) SELECT unnest($1::uuid[]) ON CONFLICT (session_id) DO UPDATE SET seen_at = now()
