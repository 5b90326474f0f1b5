-- Who holds which one-time prekeys. In, an element a key: $1 device, $2 suite, $3 prekey id.
SELECT h.sender_id, h.device_id, h.suite, h.prekey_id, h.prekey, h.expires_at
FROM unnest($1::uuid[], $2::int2[], $3::int8[]) AS t (device_id, suite, prekey_id)
JOIN handouts h ON h.device_id = ANY (ARRAY[t.device_id]) AND h.suite = t.suite AND h.prekey_id = t.prekey_id
