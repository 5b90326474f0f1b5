-- The ends of logs, locked in the order of subscribers: appends to one log follow each other. In: $1 subscriber ids.
SELECT subscriber_id, seq, head FROM device_lists WHERE subscriber_id = ANY ($1::uuid[])
ORDER BY subscriber_id
FOR NO KEY UPDATE
