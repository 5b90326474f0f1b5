-- Lock open deliveries, in one order for every statement that does, else two batches deadlock. In: $1 message ids, $2 device ids.
SELECT 1
FROM unnest($1::uuid[], $2::uuid[]) AS i (message_id, device_id)
JOIN open_deliveries o ON o.device_id = ANY (ARRAY[i.device_id]) AND o.message_id = i.message_id
ORDER BY i.device_id, i.message_id
FOR UPDATE OF o
