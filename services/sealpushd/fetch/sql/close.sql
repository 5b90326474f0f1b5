-- Deliveries, which this transaction has locked, reach a terminal state; whoever removes the row from the hot table wins.
-- In: $1 message ids, $2 device ids, $3 states, $4 reasons; for acknowledgements, else null: $5 content ids, $6 outcomes, $7 device times
--   (ms), $8 signatures, $9 envelopes' digests (null: the device could not read it). An acknowledgement closes only what has not expired,
--   and only with the right content id and digest; a message whose evidence is not kept has no digest to be wrong.
-- Out: a row for each delivery that was closed now, and whether a push may have left before.
WITH given AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::int2[], $4::int2[], $5::uuid[], $6::int2[], $7::int8[], $8::bytea[], $9::bytea[])
        AS t (message_id, device_id, state, reason, content_id, outcome, at_ms, signature, envelope_digest)
), fitting AS MATERIALIZED (
    SELECT g.*, m.sender_id, m.order_id, m.leg_no, m.group_id, m.channel, d.state AS state_before,
           -- No push can have left what was never handed to a dispatcher, and no device has what is QUEUED.
           CASE WHEN o.fence = 0 AND d.state = 1 THEN 1 ELSE 2 END AS stop_point
    FROM given g
    JOIN open_deliveries o ON o.device_id = g.device_id AND o.message_id = g.message_id
    JOIN messages m ON m.message_id = g.message_id
    JOIN deliveries d ON d.message_id = g.message_id AND d.device_id = g.device_id
    WHERE g.outcome IS NULL OR (
        o.expires_at > now() AND m.content_id = g.content_id
        AND (g.envelope_digest IS NULL OR m.evidence IS NULL OR g.envelope_digest = sha256(m.evidence))
    )
), removed AS (
    DELETE FROM open_deliveries o USING fitting f
    WHERE o.device_id = f.device_id AND o.message_id = f.message_id
    RETURNING o.device_id, o.message_id
), changed AS (
    UPDATE deliveries d
    SET state = f.state, reason = f.reason, changed_at = now(),
        fetched_at = CASE WHEN f.outcome IS NULL THEN d.fetched_at ELSE coalesce(d.fetched_at, now()) END,
        ack_outcome = f.outcome, ack_reason = CASE WHEN f.outcome IS NULL THEN NULL ELSE f.reason END,
        ack_at_ms = f.at_ms, ack_signature = f.signature, stop_point = CASE WHEN f.outcome IS NULL THEN f.stop_point END
    FROM fitting f
    WHERE d.message_id = f.message_id AND d.device_id = f.device_id
    RETURNING d.message_id, d.device_id
), fetched AS (
    -- A device that acknowledges has fetched; where that was not written yet, it is written now.
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, state, reason)
    SELECT f.message_id, f.device_id, f.sender_id, f.order_id, f.leg_no, f.group_id, f.channel, 3, 0
    FROM fitting f
    WHERE f.outcome IS NOT NULL AND f.state_before < 3
    RETURNING seq
), journal AS (
    -- Counting `fetched` makes its events come first.
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, state, reason)
    SELECT f.message_id, f.device_id, f.sender_id, f.order_id, f.leg_no, f.group_id, f.channel, f.state, f.reason
    FROM fitting f WHERE (SELECT count(*) FROM fetched) >= 0
), content AS (
    DELETE FROM contents c USING (
        SELECT DISTINCT f.message_id FROM fitting f
        WHERE NOT EXISTS (
            SELECT FROM deliveries d
            WHERE d.message_id = f.message_id AND d.state < 4
              AND NOT EXISTS (SELECT FROM fitting o WHERE o.message_id = d.message_id AND o.device_id = d.device_id)
        )
    ) done WHERE c.message_id = done.message_id
)
SELECT f.message_id, f.device_id, f.state, f.stop_point
FROM fitting f JOIN removed r USING (message_id, device_id)
