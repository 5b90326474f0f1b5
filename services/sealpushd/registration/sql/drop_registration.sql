-- $1 registration id, whose code never left.
DELETE FROM registrations WHERE registration_id = $1 AND used_at IS NULL
