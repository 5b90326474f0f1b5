-- $1 device id. Keeps two changes of the primary installation of a subscriber and app apart, in one order.
SELECT i.device_id
FROM installations own
JOIN installations i ON i.subscriber_id = own.subscriber_id AND i.app_id = own.app_id
WHERE own.device_id = $1
ORDER BY i.device_id
FOR UPDATE OF i
