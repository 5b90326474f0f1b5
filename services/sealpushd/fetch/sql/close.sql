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
           d.read_ack_signature IS NOT NULL AS read_before,
           -- No push can have left what was never handed to a dispatcher, and no device has what is QUEUED.
           CASE WHEN o.fence = 0 AND d.state = 1 THEN 1 ELSE 2 END AS stop_point
    FROM given g
    JOIN open_deliveries o ON o.device_id = ANY (ARRAY[g.device_id]) AND o.message_id = g.message_id
    JOIN messages m ON m.message_id = ANY (ARRAY[g.message_id])
    JOIN deliveries d ON d.message_id = ANY (ARRAY[g.message_id]) AND d.device_id = g.device_id
    WHERE g.outcome IS NULL OR (
        o.expires_at > now() AND m.content_id = g.content_id
        AND (g.envelope_digest IS NULL OR m.evidence IS NULL OR g.envelope_digest = sha256(m.evidence))
    )
), closed AS (
    -- Everything else follows from what this removed and so has locked, also the numbers in the journal.
    DELETE FROM open_deliveries o USING fitting f
    WHERE o.device_id = ANY (ARRAY[f.device_id]) AND o.message_id = f.message_id
    RETURNING f.*
), changed AS (
    UPDATE deliveries d
    SET state = c.state, reason = c.reason, changed_at = now(),
        fetched_at = CASE WHEN c.outcome IS NULL THEN d.fetched_at ELSE coalesce(d.fetched_at, now()) END,
        ack_outcome = c.outcome, ack_reason = CASE WHEN c.outcome IS NULL THEN NULL ELSE c.reason END,
        ack_at_ms = c.at_ms, ack_signature = c.signature,
        -- Its user had read it before it was acknowledged (`read`).
        read_at = CASE WHEN c.state = 4 AND c.read_before THEN now() ELSE d.read_at END,
        stop_point = CASE WHEN c.outcome IS NULL THEN c.stop_point END
    FROM closed c
    WHERE d.message_id = ANY (ARRAY[c.message_id]) AND d.device_id = c.device_id
), fetched AS (
    -- A device that acknowledges has fetched; where that was not written yet, it is written now.
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, state, reason)
    SELECT c.message_id, c.device_id, c.sender_id, c.order_id, c.leg_no, c.group_id, c.channel, 3, 0
    FROM closed c
    WHERE c.outcome IS NOT NULL AND c.state_before < 3
    RETURNING seq
), journal AS (
    -- Counting `fetched` makes its events come first.
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, state, reason)
    SELECT c.message_id, c.device_id, c.sender_id, c.order_id, c.leg_no, c.group_id, c.channel, c.state, c.reason
    FROM closed c WHERE (SELECT count(*) FROM fetched) >= 0
    RETURNING seq
), reading AS (
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, kind, state, reason)
    SELECT c.message_id, c.device_id, c.sender_id, c.order_id, c.leg_no, c.group_id, c.channel, 2, c.state, c.reason
    FROM closed c WHERE c.state = 4 AND c.read_before AND (SELECT count(*) FROM journal) >= 0
), content AS (
    DELETE FROM contents t USING (
        SELECT DISTINCT c.message_id FROM closed c
        WHERE NOT EXISTS (
            SELECT FROM deliveries d
            WHERE d.message_id = ANY (ARRAY[c.message_id]) AND d.state < 4
              AND (d.message_id, d.device_id) NOT IN (SELECT message_id, device_id FROM closed)
        )
    ) done WHERE t.message_id = ANY (ARRAY[done.message_id])
)
SELECT message_id, device_id, state, stop_point FROM closed
