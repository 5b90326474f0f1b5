-- Arrays of one length: $1 organisation ids, $2 keyed hashes of addresses. When each last signed in from there; no row: not that anybody
-- remembers.
SELECT a.organisation_id, a.address_hmac, a.signed_in_at
FROM unnest($1::uuid[], $2::bytea[]) AS asked (organisation_id, address_hmac)
JOIN sign_in_addresses a ON a.organisation_id = ANY (ARRAY[asked.organisation_id]) AND a.address_hmac = asked.address_hmac
