-- What is open of a sender that a recipient blocks now. In: $1 subscriber, $2 sender, $3 advertising only. Out: keys to close.
SELECT message_id, device_id FROM open_deliveries
WHERE subscriber_id = $1 AND sender_id = $2 AND (NOT $3::bool OR content_class = 2)
