-- $1 those that expired before this go, $2 and those that expire after this.
DELETE FROM registrations
WHERE registration_id IN (SELECT registration_id FROM registrations WHERE expires_at < $1 OR expires_at > $2 LIMIT 1000 FOR UPDATE SKIP LOCKED)
