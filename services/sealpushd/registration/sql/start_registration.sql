-- $1 registration id, $2 app id, $3 phone hash, $4 phone, $5 code hash, $6 attempts, $7 subscriber to make if there is none, $8 now,
-- $9 expiry, $10 no code may be younger than this. No row: an unused one is.
INSERT INTO registrations (registration_id, app_id, phone_lookup, phone, code_hash, attempts_left, new_subscriber_id, created_at, expires_at)
SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9
WHERE NOT EXISTS (
    SELECT 1 FROM registrations WHERE phone_lookup = $3 AND app_id = $2 AND created_at > $10 AND used_at IS NULL
)
RETURNING registration_id
