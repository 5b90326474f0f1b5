-- What these dispatchers held can be claimed again. In: $1 sessions.
UPDATE open_deliveries SET session_id = NULL WHERE session_id = ANY ($1::uuid[])
