-- Arrays of one length: $1 device ids, each once, $2 issue times of their challenges; $3 now; $4 the latest issue time that is possible now.
-- Accepts a challenge that is newer than every one the device answered before. What was answered while this service's clock ran ahead does
-- not count: it would lock the device out until the present has come so far. Returns the callers whose challenge was accepted.
WITH answered AS (
    SELECT i.device_id, q.issued_us
    FROM unnest($1::uuid[], $2::bigint[]) AS q (device_id, issued_us)
    JOIN installations i ON i.device_id = ANY (ARRAY[q.device_id]) AND i.state = 1
        AND (i.last_challenge_us < q.issued_us OR i.last_challenge_us > $4::bigint)
    ORDER BY q.device_id
    FOR UPDATE OF i
)
UPDATE installations i
SET last_challenge_us = a.issued_us, last_seen_at = $3
FROM answered a
WHERE i.device_id = ANY (ARRAY[a.device_id])
RETURNING i.device_id, i.subscriber_id, i.app_id, i.identity_public_key
