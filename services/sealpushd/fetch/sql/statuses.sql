-- Messages of a sender with their deliveries, a row a delivery. In: $1 sender, $2 message ids.
SELECT m.message_id, m.order_id, m.group_id, m.tag, m.leg_no, m.channel, m.accepted_at, m.expires_at,
       d.device_id, d.state, d.reason, d.push_reason, d.changed_at, d.pushed_at, d.fetched_at, d.read_at, d.late_ack_at, d.stop_point
FROM unnest($2::uuid[]) AS i (message_id)
JOIN messages m ON m.message_id = ANY (ARRAY[i.message_id]) AND m.sender_id = $1
JOIN deliveries d ON d.message_id = ANY (ARRAY[i.message_id])
-- One order, so that what is derived from the deliveries does not change between two reads.
ORDER BY i.message_id, d.device_id
