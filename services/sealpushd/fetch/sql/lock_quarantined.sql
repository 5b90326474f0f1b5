-- Find and lock what was given up for push in a lane, in the order of `lock_keys`; what is over its time is left to the sweep.
-- In: $1 app, $2 platform, $3 device and $4 message to begin after, $5 how many at the most. Out: device, message.
SELECT device_id, message_id FROM open_deliveries
WHERE app_id = $1 AND platform = $2 AND quarantined AND (device_id, message_id) > ($3::uuid, $4::uuid) AND (closes_at > now()) IS TRUE
ORDER BY device_id, message_id LIMIT $5
FOR UPDATE
