-- In: $1 sender ids, $2 request ids. Out: a row for each key that was accepted before.
SELECT a.sender_id, a.request_id, a.request_mac, a.message_id, a.devices, a.message_expires_at
FROM unnest($1::uuid[], $2::text[]) AS i (sender_id, request_id)
JOIN accepted_requests a ON a.sender_id = ANY (ARRAY[i.sender_id]) AND a.request_id = i.request_id
