-- What is open of installations that are gone. In: $1 devices. Out: keys to close.
SELECT message_id, device_id FROM open_deliveries WHERE device_id = ANY ($1::uuid[])
