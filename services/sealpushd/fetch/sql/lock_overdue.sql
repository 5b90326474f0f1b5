-- Find and lock what is over its time, in the order of `lock_keys`. What its device took while this waited has its lifetime again and is
-- left out. In: $1 how many at the most, the longest overdue first. Out: device, message, the reason it ends with.
WITH overdue AS MATERIALIZED (
    SELECT device_id, message_id FROM open_deliveries WHERE closes_at <= now() ORDER BY closes_at LIMIT $1
)
SELECT o.device_id, o.message_id, o.close_reason
FROM overdue d JOIN open_deliveries o ON o.device_id = ANY (ARRAY[d.device_id]) AND o.message_id = d.message_id
WHERE (o.closes_at <= now()) IS TRUE
ORDER BY d.device_id, d.message_id
FOR UPDATE OF o
