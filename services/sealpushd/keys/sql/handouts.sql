-- What a sender got for requests. In, an element a device of a request: $1 sender; $2 request id, $3 device.
SELECT h.request_id, h.device_id, h.suite, h.prekey, h.expires_at
FROM unnest($2::text[], $3::uuid[]) AS t (request_id, device_id)
JOIN handouts h ON h.sender_id = $1 AND h.request_id = t.request_id AND h.device_id = ANY (ARRAY[t.device_id])
