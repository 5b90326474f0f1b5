-- $1 device id, $2 sender id to go on after, $3 rows at most. Those of the device's subscriber of now.
SELECT p.sender_id, p.block_all, p.block_advertising, p.mute
FROM installations d
CROSS JOIN LATERAL (
    SELECT * FROM preferences WHERE subscriber_id = d.subscriber_id AND sender_id > $2 ORDER BY sender_id LIMIT $3
) p
WHERE d.device_id = $1 AND d.state = 1
ORDER BY p.sender_id
