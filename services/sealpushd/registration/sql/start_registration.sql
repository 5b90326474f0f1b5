-- $1 registration id, $2 app id, $3 phone hash, $4 phone, $5 code hash, $6 attempts, $7 subscriber to make if there is none, $8 now,
-- $9 expiry, $10 no code may be younger than this, $11 no moment that was stored can honestly be later than this. No row: an unused code
-- is younger. Runs under the number's lock, so that of two that ask at once one is.
-- A code that is said to be made later was made while a clock ran ahead: it counts as made now, and for good, so that the number waits as
-- long as any other.
WITH ahead AS (
    UPDATE registrations SET created_at = $8, expires_at = least(expires_at, $9)
    WHERE phone_lookup = $3 AND app_id = $2 AND created_at > $11 AND used_at IS NULL
)
INSERT INTO registrations (registration_id, app_id, phone_lookup, phone, code_hash, attempts_left, new_subscriber_id, created_at, expires_at)
SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9
WHERE NOT EXISTS (
    SELECT 1 FROM registrations WHERE phone_lookup = $3 AND app_id = $2 AND created_at > $10 AND used_at IS NULL
)
RETURNING registration_id
