-- $1 root, $2 role, $3 sender id (zeros for the platform), $4 serial, $5 entry, $6 now. One that was put before stays as it is.
INSERT INTO entries (root_public_key, role, sender_id, serial, entry, put_at)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT DO NOTHING
