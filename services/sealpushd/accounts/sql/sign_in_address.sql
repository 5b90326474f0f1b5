-- $1 organisation id, $2 keyed hash of an address. When it last signed in from there; no row: not that anybody remembers.
SELECT signed_in_at FROM sign_in_addresses WHERE organisation_id = $1 AND address_hmac = $2
