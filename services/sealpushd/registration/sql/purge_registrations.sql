-- $1 now. Those that expired longer ago than $2 go, and those that expire later than $2 from now: by the database's clock and by the process's,
-- because one whose clock is wrong would take the others' codes away.
DELETE FROM registrations
WHERE registration_id = ANY (
    ARRAY(SELECT registration_id FROM registrations WHERE expires_at < least($1::timestamptz, now()) - $2::interval LIMIT 1000 FOR UPDATE SKIP LOCKED)
    || ARRAY(SELECT registration_id FROM registrations WHERE expires_at > greatest($1, now()) + $2 LIMIT 1000 FOR UPDATE SKIP LOCKED)
)
