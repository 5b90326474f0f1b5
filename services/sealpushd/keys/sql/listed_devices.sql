-- Those of these devices that are in a list. In: $1 device ids.
SELECT device_id, subscriber_id, NOT recovered AS vouched FROM devices WHERE device_id = ANY ($1::uuid[]) AND removed_at IS NULL
