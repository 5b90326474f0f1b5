-- $1 organisation id, $2 keyed hash of the address it signed in from, $3 now, $4 what is older ended, $5 as many are kept of an organisation.
WITH ended AS (
    DELETE FROM sign_in_addresses
    WHERE ctid IN (SELECT ctid FROM sign_in_addresses WHERE signed_in_at < $4 AND (organisation_id, address_hmac) <> ($1, $2)
                   LIMIT 100 FOR UPDATE SKIP LOCKED)
), surplus AS (
    DELETE FROM sign_in_addresses
    WHERE ctid IN (SELECT ctid FROM sign_in_addresses
                   WHERE ctid IN (SELECT ctid
                                  FROM (SELECT ctid, signed_in_at FROM sign_in_addresses
                                        WHERE organisation_id = $1 AND address_hmac <> $2 OFFSET 0) own
                                  ORDER BY signed_in_at DESC OFFSET $5 - 1 LIMIT 100)
                   FOR UPDATE SKIP LOCKED)
)
INSERT INTO sign_in_addresses (organisation_id, address_hmac, signed_in_at) VALUES ($1, $2, $3)
ON CONFLICT (organisation_id, address_hmac) DO UPDATE SET signed_in_at = excluded.signed_in_at
