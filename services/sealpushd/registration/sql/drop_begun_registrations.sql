-- $1 subscriber id, $2 device id. Those of the subscriber's numbers that the device began and did not finish: their codes are worth nothing
-- any more.
DELETE FROM registrations r
USING identifiers i
WHERE i.subscriber_id = $1 AND i.kind = 1 AND i.scope = '' AND r.phone_lookup = ANY (ARRAY[i.lookup_hmac])
  AND r.used_by_device_id = $2 AND r.used_at IS NULL
