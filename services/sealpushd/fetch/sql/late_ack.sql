-- Acknowledgements of what is not open: repeated, late, or unknown.
-- In: $1 message ids, $2 device ids, $3 content ids, $4 outcomes, $5 reasons, $6 device times (ms), $7 signatures,
--   $8 envelopes' digests (null: the device could not read it).
-- Out: a row for each delivery that exists with this content id and digest: its state, and whether it ended by this very acknowledgement.
WITH given AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::int2[], $5::int2[], $6::int8[], $7::bytea[], $8::bytea[])
        AS t (message_id, device_id, content_id, outcome, ack_reason, at_ms, signature, envelope_digest)
), found AS (
    SELECT g.message_id, g.device_id, g.outcome, g.ack_reason, g.at_ms, g.signature, d.state, d.reason,
           m.sender_id, m.order_id, m.leg_no, m.group_id, m.channel,
           coalesce(d.ack_outcome = g.outcome, false) AS repeated
    FROM given g
    JOIN messages m ON m.message_id = ANY (ARRAY[g.message_id]) AND m.content_id = g.content_id
        AND (g.envelope_digest IS NULL OR m.evidence IS NULL OR g.envelope_digest = sha256(m.evidence))
    JOIN deliveries d ON d.message_id = ANY (ARRAY[g.message_id]) AND d.device_id = g.device_id
), late AS (
    UPDATE deliveries d SET
        late_ack_at = now(), late_ack_outcome = f.outcome, late_ack_reason = f.ack_reason, late_ack_at_ms = f.at_ms,
        late_ack_signature = f.signature
    FROM found f
    WHERE d.message_id = ANY (ARRAY[f.message_id]) AND d.device_id = f.device_id AND NOT f.repeated AND d.state >= 4 AND d.late_ack_at IS NULL
    RETURNING f.*
), journal AS (
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, kind, state, reason)
    SELECT message_id, device_id, sender_id, order_id, leg_no, group_id, channel, 3, state, reason FROM late
)
SELECT message_id, device_id, state, repeated FROM found
