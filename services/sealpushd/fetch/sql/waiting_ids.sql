-- Which deliveries are open, without taking them. In: $1 device ids, $2 how many a device at the most. Out: device, message.
SELECT o.device_id, o.message_id
FROM unnest($1::uuid[]) AS i (device_id)
CROSS JOIN LATERAL (
    SELECT device_id, message_id FROM open_deliveries WHERE device_id = i.device_id AND expires_at > now() ORDER BY message_id LIMIT $2
) o
