-- The user read them. This transaction has locked those that are open, and the ended ones all together. In: $1 message ids, $2 device ids, $3 content ids, $4 envelopes' digests, $5 device times (ms), $6 signatures.
-- Out: a row for each delivery that exists with this content id and digest.
WITH given AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::bytea[], $5::int8[], $6::bytea[])
        AS t (message_id, device_id, content_id, envelope_digest, at_ms, signature)
), found AS (
    -- Once a delivery, also where no evidence is kept and several digests count.
    SELECT DISTINCT ON (g.message_id, g.device_id)
           g.message_id, g.device_id, g.at_ms, g.signature, d.state, d.reason, m.sender_id, m.order_id, m.leg_no, m.group_id, m.channel
    FROM given g
    JOIN messages m ON m.message_id = ANY (ARRAY[g.message_id]) AND m.content_id = g.content_id
        AND (m.evidence IS NULL OR g.envelope_digest = sha256(m.evidence))
    JOIN deliveries d ON d.message_id = ANY (ARRAY[g.message_id]) AND d.device_id = g.device_id
), marked AS (
    -- Of a delivery that is open, the first one is kept and counts when it is acknowledged (`close`).
    UPDATE deliveries d SET
        read_at = CASE WHEN d.state = 4 THEN now() END,
        read_ack_at_ms = CASE WHEN d.read_ack_signature IS NULL THEN f.at_ms ELSE d.read_ack_at_ms END,
        read_ack_signature = coalesce(d.read_ack_signature, f.signature)
    FROM found f
    WHERE d.message_id = ANY (ARRAY[f.message_id]) AND d.device_id = f.device_id AND d.read_at IS NULL
      AND (d.state = 4 OR (d.state < 4 AND d.read_ack_signature IS NULL))
    RETURNING f.*
), journal AS (
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, kind, state, reason)
    SELECT message_id, device_id, sender_id, order_id, leg_no, group_id, channel, 2, state, reason FROM marked WHERE state = 4
)
SELECT message_id, device_id, state FROM found
