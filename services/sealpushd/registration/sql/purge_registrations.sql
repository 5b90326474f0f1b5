-- $1 those that expired before this go.
DELETE FROM registrations
WHERE registration_id IN (SELECT registration_id FROM registrations WHERE expires_at < $1 LIMIT 1000 FOR UPDATE SKIP LOCKED)
