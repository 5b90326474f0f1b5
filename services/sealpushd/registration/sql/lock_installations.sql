-- $1 device ids. What is stored of them, kept until the end of the transaction, in one order.
SELECT device_id, subscriber_id, state FROM installations WHERE device_id = ANY ($1::uuid[])
ORDER BY device_id
FOR NO KEY UPDATE
