-- The ends of device logs. In: $1 subscriber ids.
SELECT subscriber_id, seq, head, identity_changed_at FROM device_lists WHERE subscriber_id = ANY ($1::uuid[])
