-- $1 those that expired before this go, $2 and those that expire after this.
DELETE FROM registrations
WHERE registration_id = ANY (
    ARRAY(SELECT registration_id FROM registrations WHERE expires_at < $1 LIMIT 1000 FOR UPDATE SKIP LOCKED)
    || ARRAY(SELECT registration_id FROM registrations WHERE expires_at > $2 LIMIT 1000 FOR UPDATE SKIP LOCKED)
)
