-- Notes handouts; a key that somebody holds already is not handed out again. The caller has locked the devices.
-- In: $1 sender, $2 when they end. In, an element a handout: $3 request id, $4 device, $5 suite, $6 prekey id, $7 record of the key.
-- Out: those that were noted, like `handouts`.
INSERT INTO handouts (sender_id, expires_at, request_id, device_id, suite, prekey_id, prekey)
SELECT $1, $2::timestamptz, t.* FROM unnest($3::text[], $4::uuid[], $5::int2[], $6::int8[], $7::bytea[]) AS t
ON CONFLICT DO NOTHING
RETURNING request_id, device_id, suite, prekey, expires_at
