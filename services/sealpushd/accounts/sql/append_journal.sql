-- $1 now, $2 actor, $3 action, $4 subject, $5 detail as JSON.
INSERT INTO journal (at, actor, action, subject, detail) VALUES ($1, $2, $3, $4, $5::jsonb)
