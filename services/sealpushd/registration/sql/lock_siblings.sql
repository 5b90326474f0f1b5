-- $1 device id. Keeps two changes of the primary installation of a subscriber and app apart, in one order.
WITH siblings AS MATERIALIZED (
    SELECT i.device_id, own.subscriber_id, own.app_id
    FROM installations own
    JOIN installations i ON i.subscriber_id = ANY (ARRAY[own.subscriber_id]) AND (i.app_id = own.app_id) IS TRUE
    WHERE own.device_id = $1
)
SELECT i.device_id
FROM siblings s
JOIN installations i ON i.device_id = ANY (ARRAY[s.device_id]) AND (i.subscriber_id, i.app_id) IS NOT DISTINCT FROM (s.subscriber_id, s.app_id)
ORDER BY s.device_id
FOR UPDATE OF i
