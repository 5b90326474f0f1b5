-- Makes these the current signed prekeys; what was current becomes the one before. The caller has locked the devices.
-- In, an element a device: $1 device, $2 suite, $3 prekey id, $4 public key, $5 created, $6 expires, $7 signature; $8 now. Out: nothing.
WITH given AS (
    SELECT * FROM unnest($1::uuid[], $2::int2[], $3::int8[], $4::bytea[], $5::int8[], $6::int8[], $7::bytea[])
        AS t (device_id, suite, prekey_id, public_key, created_at_ms, expires_at_ms, signature)
), superseded AS (
    INSERT INTO signed_prekeys AS p
    SELECT c.device_id, false, c.suite, c.prekey_id, c.public_key, c.created_at_ms, c.expires_at_ms, c.signature, $8::timestamptz
    FROM given g CROSS JOIN LATERAL (SELECT * FROM signed_prekeys WHERE device_id = g.device_id AND is_current OFFSET 0) c
    ON CONFLICT (device_id, is_current) DO UPDATE
    SET suite = excluded.suite, prekey_id = excluded.prekey_id, public_key = excluded.public_key, created_at_ms = excluded.created_at_ms,
        expires_at_ms = excluded.expires_at_ms, signature = excluded.signature, superseded_at = excluded.superseded_at
)
INSERT INTO signed_prekeys AS p
SELECT device_id, true, suite, prekey_id, public_key, created_at_ms, expires_at_ms, signature, NULL FROM given
ON CONFLICT (device_id, is_current) DO UPDATE
SET suite = excluded.suite, prekey_id = excluded.prekey_id, public_key = excluded.public_key, created_at_ms = excluded.created_at_ms,
    expires_at_ms = excluded.expires_at_ms, signature = excluded.signature
