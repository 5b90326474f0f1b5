-- $1 subscriber id, $2 sender id.
DELETE FROM preferences WHERE subscriber_id = $1 AND sender_id = $2
