-- $1 device id, $2 sender id to go on after, $3 rows at most. Those of the device's subscriber of now.
SELECT p.sender_id, p.block_all, p.block_advertising, p.mute
FROM installations d
JOIN preferences p ON p.subscriber_id = d.subscriber_id
WHERE d.device_id = $1 AND d.state = 1 AND p.sender_id > $2
ORDER BY p.sender_id
LIMIT $3
