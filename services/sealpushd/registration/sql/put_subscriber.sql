-- $1 subscriber id, $2 now.
INSERT INTO subscribers (subscriber_id, created_at) VALUES ($1, $2) ON CONFLICT DO NOTHING
