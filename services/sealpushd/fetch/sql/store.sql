-- Messages with everything that belongs to them, in one statement and so in one commit.
-- In, an element a message:  $1 sender, $2 request id, $3 mac, $4 message id, $5 subscriber, $6 app, $7 class, $8 priority, $9 created,
--   $10 expires, $11 order, $12 leg, $13 channel, $14 group, $15 traffic type, $16 tag, $17 originator requested, $18 effective,
--   $19 muted, $20 content id, $21 head, $22 tail, $23 devices, $24 replace hash, $35 evidence (null: nothing was sealed).
-- In, an element a delivery: $25 message id, $26 device, $27 state, $28 reason, $29 push reason, $30 platform, $31 stanza,
--   $32 wake-up id, $33 seconds until the push (null: none), $34 seconds after which it ends if its device has not fetched it, because
--   that device's token is dead (null: at the end of its lifetime), $36 which of the messages it is of, from 1.
-- Batches are not joined with each other, which would compare every row with every other: what was stored is a hashed set, and a delivery
-- takes its message's columns by number.
-- Out: the message ids that were stored now; a key that exists already stores nothing of its message.
WITH given AS (
    SELECT * FROM unnest(
        $1::uuid[], $2::text[], $3::bytea[], $4::uuid[], $5::uuid[], $6::text[], $7::int2[], $8::int2[], $9::timestamptz[],
        $10::timestamptz[], $11::uuid[], $12::int2[], $13::int2[], $14::uuid[], $15::int2[], $16::text[], $17::text[], $18::text[],
        $19::bool[], $20::uuid[], $21::bytea[], $22::bytea[], $23::int2[], $24::bytea[], $35::bytea[]
    ) AS t (sender_id, request_id, request_mac, message_id, subscriber_id, app_id, content_class, priority, created_at, expires_at,
            order_id, leg_no, channel, group_id, traffic_type, tag, originator_requested, originator_effective, muted, content_id,
            head, tail, devices, replace_hash, evidence)
), given_deliveries AS (
    SELECT * FROM unnest(
        $25::uuid[], $26::uuid[], $27::int2[], $28::int2[], $29::int2[], $30::int2[], $31::bytea[], $32::uuid[], $33::float8[],
        $34::float8[], $36::int4[]
    ) AS t (message_id, device_id, state, reason, push_reason, platform, stanza, wake_up_id, push_in_s, grace_s, of)
), keys AS (
    INSERT INTO accepted_requests (sender_id, request_id, request_mac, message_id, devices, message_expires_at)
    SELECT sender_id, request_id, request_mac, message_id, devices, expires_at FROM given
    ON CONFLICT DO NOTHING
    RETURNING message_id
), stored AS (
    INSERT INTO messages (message_id, sender_id, subscriber_id, app_id, order_id, leg_no, channel, group_id, traffic_type, content_class,
                          priority, tag, originator_requested, originator_effective, content_id, muted, created_at, expires_at,
                          evidence)
    SELECT message_id, sender_id, subscriber_id, app_id, order_id, leg_no, channel, group_id, traffic_type, content_class,
           priority, tag, originator_requested, originator_effective, content_id, muted, created_at, expires_at, evidence
    FROM given WHERE (message_id IN (SELECT message_id FROM keys)) IS TRUE
), content AS (
    INSERT INTO contents (message_id, head, tail)
    SELECT message_id, head, tail FROM given
    WHERE (message_id IN (SELECT message_id FROM keys)) IS TRUE
      AND head <> '' AND (message_id IN (SELECT message_id FROM given_deliveries WHERE state < 4)) IS TRUE
), fresh AS MATERIALIZED (
    SELECT * FROM given_deliveries WHERE (message_id IN (SELECT message_id FROM keys)) IS TRUE
), delivery AS (
    INSERT INTO deliveries (message_id, device_id, state, reason, push_reason, platform, stanza)
    SELECT message_id, device_id, state, reason, push_reason, platform, nullif(stanza, '') FROM fresh
), open AS (
    INSERT INTO open_deliveries (device_id, message_id, wake_up_id, sender_id, subscriber_id, content_class, app_id, platform, priority,
                                 muted, bytes, replace_hash, expires_at, closes_at, close_reason, next_attempt_at)
    SELECT d.device_id, d.message_id, d.wake_up_id, ($1::uuid[])[of], ($5::uuid[])[of], ($7::int2[])[of], ($6::text[])[of], d.platform,
           ($8::int2[])[of], ($19::bool[])[of], length(($21::bytea[])[of]) + length(d.stanza) + length(($22::bytea[])[of]),
           nullif(($24::bytea[])[of], ''), e.expires_at,
           -- A null counts for nothing in both.
           least(e.expires_at, now() + d.grace_s * interval '1 second'),
           CASE WHEN now() + d.grace_s * interval '1 second' < e.expires_at THEN 105 ELSE 102 END,
           now() + d.push_in_s * interval '1 second'
    FROM fresh d CROSS JOIN LATERAL (SELECT ($10::timestamptz[])[d.of] AS expires_at) e
    WHERE d.state < 4
), journal AS (
    INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, group_id, channel, state, reason)
    SELECT d.message_id, d.device_id, ($1::uuid[])[of], ($11::uuid[])[of], ($12::int2[])[of], ($14::uuid[])[of], ($13::int2[])[of],
           d.state, d.reason
    FROM fresh d
)
SELECT message_id FROM keys
