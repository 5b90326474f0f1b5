-- $1 app id, $2 phone hash. When the newest unused code was made.
SELECT max(created_at) AS created_at FROM registrations WHERE phone_lookup = $2 AND app_id = $1 AND used_at IS NULL
