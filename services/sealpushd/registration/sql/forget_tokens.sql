-- Arrays of one length: $1 device ids, $2 token hashes, $3 times of death; $4 now, $5 the latest time of a registration that is possible
-- now. Forgets a token where it is still the same and was registered before it died, and remembers that it is gone. A registration of
-- the future was written by a clock that was ahead: it is no newer word than the push service's. Returns device ids and hashes of the
-- tokens that were forgotten.
WITH dead AS (
    SELECT i.device_id, i.push_token_lookup
    FROM unnest($1::uuid[], $2::bytea[], $3::timestamptz[]) AS q (device_id, push_token_lookup, dead_at)
    JOIN installations i ON i.device_id = ANY (ARRAY[q.device_id])
                        AND (i.push_token_lookup = q.push_token_lookup) IS TRUE
                        AND (i.token_registered_at < q.dead_at OR i.token_registered_at > $5)
    -- In one order everywhere: two batches never wait for each other.
    ORDER BY q.device_id
    FOR UPDATE OF i
)
UPDATE installations i
SET push_token = NULL, push_token_lookup = NULL, token_registered_at = NULL, token_gone_at = $4, updated_at = $4
FROM dead
WHERE i.device_id = ANY (ARRAY[dead.device_id])
RETURNING i.device_id, dead.push_token_lookup
