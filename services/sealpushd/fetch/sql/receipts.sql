-- What is kept of a sender's messages as evidence, a row a delivery. In: $1 sender, $2 message ids.
SELECT m.message_id, m.content_id, m.evidence, d.device_id, d.state, d.reason,
       d.ack_outcome, d.ack_reason, d.ack_at_ms, d.ack_signature,
       d.late_ack_outcome, d.late_ack_reason, d.late_ack_at_ms, d.late_ack_signature,
       d.read_ack_at_ms, d.read_ack_signature
FROM unnest($2::uuid[]) AS i (message_id)
JOIN messages m ON m.message_id = ANY (ARRAY[i.message_id]) AND m.sender_id = $1
JOIN deliveries d ON d.message_id = ANY (ARRAY[i.message_id])
ORDER BY i.message_id, d.device_id
