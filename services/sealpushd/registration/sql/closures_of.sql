-- $1 device id. What is still to be told about it.
SELECT closure_id, kind, subscriber_id, device_id, sender_id, reason_code, advertising_only
FROM (SELECT * FROM pending_closures WHERE device_id = $1 OFFSET 0) c ORDER BY closure_id
