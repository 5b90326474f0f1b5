-- The mailbox. Numbers of states, reasons, classes, priorities, channels, traffic types and platforms are those of
-- protos/sealpush/v1/common.proto. States below 4 are open, from 4 on terminal.

-- Data keys of the service, wrapped by the key outside PostgreSQL.
CREATE TABLE vault_keys (
    name    text PRIMARY KEY,
    wrapped bytea NOT NULL
);

-- Idempotency. Hash-partitioned: a unique key cannot span partitions by range.
CREATE TABLE accepted_requests (
    sender_id          uuid NOT NULL,
    request_id         text COLLATE "C" NOT NULL,
    -- Keyed MAC over the request as received: an unkeyed hash of a six-digit code is guessed from a stolen database.
    request_mac        bytea NOT NULL,
    message_id         uuid NOT NULL,
    devices            smallint NOT NULL,
    message_expires_at timestamptz NOT NULL,
    expires_at         timestamptz NOT NULL DEFAULT now() + interval '28 days',
    PRIMARY KEY (sender_id, request_id)
) PARTITION BY HASH (sender_id, request_id);
DO $$
BEGIN
    FOR i IN 0..7 LOOP
        EXECUTE format('CREATE TABLE accepted_requests_%s PARTITION OF accepted_requests FOR VALUES WITH (MODULUS 8, REMAINDER %s)', i, i);
        -- Rows come in the order they end in: a block range index is enough to find the ended ones, and costs a write nothing.
        EXECUTE format('CREATE INDEX ON accepted_requests_%s USING brin (expires_at)', i);
    END LOOP;
END $$;

-- What was accepted; never changes.
CREATE TABLE messages (
    message_id           uuid NOT NULL,
    sender_id            uuid NOT NULL,
    subscriber_id        uuid NOT NULL,
    app_id               text NOT NULL,
    -- An order is served by legs over channels; by default a message is the only leg of an order named after it.
    order_id             uuid NOT NULL,
    leg_no               smallint NOT NULL DEFAULT 0,
    channel              smallint NOT NULL DEFAULT 1,
    -- Distribution or campaign.
    group_id             uuid,
    traffic_type         smallint NOT NULL DEFAULT 0,
    content_class        smallint NOT NULL,
    priority             smallint NOT NULL DEFAULT 2,
    -- The sender's own tag.
    tag                  text,
    -- Service name asked for, and the one that rules of substitution decided on.
    originator_requested text,
    originator_effective text,
    -- Chosen by whoever sealed.
    content_id           uuid NOT NULL,
    muted                boolean NOT NULL DEFAULT false,
    created_at           timestamptz NOT NULL,
    accepted_at          timestamptz NOT NULL DEFAULT now(),
    expires_at           timestamptz NOT NULL,
    PRIMARY KEY (message_id)
) PARTITION BY RANGE (message_id);
CREATE INDEX ON messages (group_id, message_id) WHERE group_id IS NOT NULL;
CREATE INDEX ON messages (order_id, message_id) WHERE order_id <> message_id;

-- What all devices of a message share of its envelope. Gone as soon as no device needs it.
CREATE TABLE contents (
    message_id uuid NOT NULL,
    -- Header and commitment.
    head       bytea NOT NULL,
    -- Encrypted content and signature: random bytes, so compressing them is lost work.
    tail       bytea STORAGE EXTERNAL NOT NULL,
    PRIMARY KEY (message_id)
) PARTITION BY RANGE (message_id);

-- One row a device that a message goes to. Only the primary key is indexed, so that changes of state stay within the page.
CREATE TABLE deliveries (
    message_id    uuid NOT NULL,
    device_id     uuid NOT NULL,
    state         smallint NOT NULL,
    reason        smallint NOT NULL DEFAULT 0,
    -- Why an open delivery is not pushed.
    push_reason   smallint NOT NULL DEFAULT 0,
    platform      smallint NOT NULL,
    attempts      smallint NOT NULL DEFAULT 0,
    stanza        bytea STORAGE PLAIN,
    changed_at    timestamptz NOT NULL DEFAULT now(),
    pushed_at     timestamptz,
    fetched_at    timestamptz,
    read_at       timestamptz,
    late_ack_at   timestamptz,
    -- The acknowledgement as signed: evidence.
    ack_outcome   smallint,
    ack_reason    smallint,
    ack_at_ms     bigint,
    ack_signature bytea,
    -- What a cancellation or a block answered: 1 before the push, 2 a push may have left.
    stop_point    smallint,
    -- The push service's last word, for operators.
    detail        text,
    PRIMARY KEY (message_id, device_id)
) PARTITION BY RANGE (message_id);

-- The hot table: open deliveries only. Feeds dispatch and answers "what waits for this device" without asking many partitions.
CREATE TABLE open_deliveries (
    device_id       uuid NOT NULL,
    message_id      uuid NOT NULL,
    -- Random, passes the push service; means nothing without the device's own proof.
    wake_up_id      uuid NOT NULL,
    sender_id       uuid NOT NULL,
    subscriber_id   uuid NOT NULL,
    content_class   smallint NOT NULL,
    app_id          text NOT NULL,
    platform        smallint NOT NULL,
    priority        smallint NOT NULL,
    muted           boolean NOT NULL,
    -- Bytes of the envelope this device gets, so that pages are bounded before they are read.
    bytes           int NOT NULL,
    replace_hash    bytea,
    expires_at      timestamptz NOT NULL,
    -- When it ends if nothing happens before: at expiry, or a short grace after its token died.
    closes_at       timestamptz NOT NULL,
    close_reason    smallint NOT NULL DEFAULT 102,
    -- When to push; null: nothing to push.
    next_attempt_at timestamptz,
    attempts        smallint NOT NULL DEFAULT 0,
    quarantined     boolean NOT NULL DEFAULT false,
    -- The dispatcher that holds it. The fence counts the hand-outs: 0 means that no push can have left.
    session_id      uuid,
    fence           bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (device_id, message_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);
CREATE INDEX open_deliveries_claim ON open_deliveries (app_id, platform, priority DESC, next_attempt_at)
    WHERE next_attempt_at IS NOT NULL AND session_id IS NULL;
CREATE INDEX open_deliveries_close ON open_deliveries (closes_at);
CREATE INDEX open_deliveries_session ON open_deliveries (session_id) WHERE session_id IS NOT NULL;
CREATE INDEX open_deliveries_replace ON open_deliveries (device_id, replace_hash) WHERE replace_hash IS NOT NULL;
CREATE INDEX open_deliveries_subscriber ON open_deliveries (subscriber_id, sender_id);

-- Dispatchers that hold leases. One that was not seen for a while has lost them.
CREATE TABLE wake_up_sessions (
    session_id uuid PRIMARY KEY,
    seen_at    timestamptz NOT NULL DEFAULT now()
);

-- The journal: every change of a delivery, written in the transaction of the change. Read in the order (xid, seq) below the oldest
-- transaction that still runs: a plain sequence would skip what commits late.
CREATE SEQUENCE status_events_seq;
CREATE TABLE status_events (
    xid        xid8 NOT NULL DEFAULT pg_current_xact_id(),
    seq        bigint NOT NULL DEFAULT nextval('status_events_seq'),
    at         timestamptz NOT NULL DEFAULT now(),
    message_id uuid NOT NULL,
    device_id  uuid NOT NULL,
    sender_id  uuid NOT NULL,
    order_id   uuid NOT NULL,
    leg_no     smallint NOT NULL,
    group_id   uuid,
    channel    smallint NOT NULL,
    -- 1 state, 2 read, 3 late acknowledgement.
    kind       smallint NOT NULL DEFAULT 1,
    state      smallint NOT NULL,
    reason     smallint NOT NULL
) PARTITION BY RANGE (at);
CREATE INDEX ON status_events (xid, seq);

-- The smallest UUIDv7 of a moment.
CREATE FUNCTION uuid7_floor(moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || '00000000000000000000')::uuid
$$;

-- Weekly partitions from last week to `ahead` weeks on. Weekly and not daily: what looks at a device's deliveries visits every
-- partition of a message's longest life.
CREATE FUNCTION ensure_partitions(ahead int DEFAULT 6) RETURNS int LANGUAGE plpgsql SECURITY DEFINER SET search_path = "fetch", pg_temp AS $$
DECLARE
    week timestamptz := date_trunc('week', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' - interval '1 week';
    made int := 0;
    parent text;
    part text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('fetch.partitions'));
    FOR i IN 0..ahead + 1 LOOP
        FOREACH parent IN ARRAY ARRAY['messages', 'contents', 'deliveries', 'status_events'] LOOP
            part := format('%s_%s', parent, to_char(week AT TIME ZONE 'UTC', 'IYYY"w"IW'));
            IF to_regclass(part) IS NULL THEN
                IF parent = 'status_events' THEN
                    EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)', part, parent, week, week + interval '1 week');
                ELSE
                    EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)', part, parent,
                                   uuid7_floor(week), uuid7_floor(week + interval '1 week'));
                END IF;
                IF parent = 'deliveries' THEN
                    -- Room for the changes of state on the same page.
                    EXECUTE format('ALTER TABLE %I SET (fillfactor = 50)', part);
                END IF;
                EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %I TO fetch_app', part);
                made := made + 1;
            END IF;
        END LOOP;
        week := week + interval '1 week';
    END LOOP;
    RETURN made;
END $$;

-- Drop partitions that end before the retention: contents after the longest lifetime, the rest after `keep`.
CREATE FUNCTION drop_partitions(keep interval DEFAULT interval '90 days') RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = "fetch", pg_temp AS $$
DECLARE
    dropped int := 0;
    old record;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('fetch.partitions'));
    FOR old IN
        SELECT child.relname AS part, parent.relname AS parent
        FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid JOIN pg_class parent ON parent.oid = inhparent
        WHERE parent.relname IN ('messages', 'contents', 'deliveries', 'status_events')
          AND parent.relnamespace = 'fetch'::regnamespace
    LOOP
        -- The name ends in its ISO week.
        IF to_timestamp(right(old.part, 7), 'IYYY"w"IW') + interval '1 week'
           < now() - (CASE WHEN old.parent = 'contents' THEN interval '29 days' ELSE greatest(keep, interval '29 days') END) THEN
            EXECUTE format('DROP TABLE %I', old.part);
            dropped := dropped + 1;
        END IF;
    END LOOP;
    DELETE FROM accepted_requests WHERE expires_at < now();
    RETURN dropped;
END $$;

SELECT ensure_partitions();
