-- Keys of devices and the log of devices. Only public halves are here; times that devices sign are Unix milliseconds, as signed.
-- Whoever locks rows of several tables takes them in this order: devices by id, then device_lists by subscriber, then the rest.

-- Data keys of the service, wrapped by the key outside PostgreSQL.
CREATE TABLE vault_keys (
    name    text PRIMARY KEY,
    wrapped bytea NOT NULL
);

-- Every device that ever was. Rows stay after a removal: a device id never gets another identity, and a counter never starts again.
CREATE TABLE devices (
    device_id           uuid PRIMARY KEY,
    -- Whose device it is, or was when it was removed.
    subscriber_id       uuid NOT NULL,
    -- Ed25519.
    identity_public_key bytea NOT NULL CHECK (octet_length(identity_public_key) = 32),
    -- Lowest suite the device accepts; only rises.
    min_suite           smallint NOT NULL DEFAULT 1,
    -- Of the last change the device proved.
    change_counter      bigint NOT NULL DEFAULT 0,
    added_at            timestamptz NOT NULL,
    -- Null: the device is in its subscriber's list.
    removed_at          timestamptz
) WITH (fillfactor = 80);

-- The present signed prekey of a device, and the one before it: senders may still hold that for a while.
CREATE TABLE signed_prekeys (
    device_id     uuid NOT NULL,
    is_current    boolean NOT NULL,
    suite         smallint NOT NULL,
    -- Unsigned 32 bits.
    prekey_id     bigint NOT NULL,
    public_key    bytea NOT NULL,
    created_at_ms bigint NOT NULL,
    expires_at_ms bigint NOT NULL,
    -- By the device's identity key, as uploaded.
    signature     bytea NOT NULL,
    -- When the next one came; null for the current one.
    superseded_at timestamptz,
    PRIMARY KEY (device_id, is_current),
    CHECK (is_current = (superseded_at IS NULL))
);

-- One blob of keys a device: a row a key would be 10⁹ rows at ten million devices.
CREATE TABLE one_time_prekeys (
    device_id   uuid NOT NULL,
    suite       smallint NOT NULL,
    -- Index of the blob's first key, counted over all keys the device ever uploaded in this suite.
    first_index bigint NOT NULL DEFAULT 0,
    -- Index of the next key to hand out. What lies before it in the blob was handed out and goes with the next upload.
    next_index  bigint NOT NULL DEFAULT 0,
    -- Records of one length a suite, oldest first: prekey id 4 bytes, created 8, expires 8, public key, signature 64; big-endian.
    blob        bytea STORAGE EXTERNAL NOT NULL,
    PRIMARY KEY (device_id, suite),
    CHECK (first_index <= next_index)
);

-- Which one-time prekey a sender got for a request: asking again gives the same one, so a lost answer burns nothing.
-- Nothing writes here yet: one-time prekeys are stored and counted, and not handed out.
CREATE TABLE handouts (
    sender_id    uuid NOT NULL,
    request_id   text COLLATE "C" NOT NULL,
    device_id    uuid NOT NULL,
    suite        smallint NOT NULL,
    -- Null: none was left, the signed prekey was given.
    prekey_index bigint,
    -- The record of the key: the blob has forgotten it by the time the answer is asked for again.
    prekey       bytea,
    expires_at   timestamptz NOT NULL,
    PRIMARY KEY (sender_id, request_id, device_id),
    CHECK ((prekey_index IS NULL) = (prekey IS NULL))
);
CREATE INDEX ON handouts USING brin (expires_at);

-- Who has which device: append-only, a hash chain a subscriber. The layout of an entry stands in rules.py.
CREATE TABLE device_log (
    subscriber_id uuid NOT NULL,
    -- 1 for the first.
    seq           bigint NOT NULL,
    entry         bytea NOT NULL,
    -- The head of the chain after this entry.
    hash          bytea NOT NULL CHECK (octet_length(hash) = 32),
    PRIMARY KEY (subscriber_id, seq)
);

-- The end of each log. Whoever appends holds this row locked.
CREATE TABLE device_lists (
    subscriber_id       uuid PRIMARY KEY,
    -- Of the last entry; 0: none yet.
    seq                 bigint NOT NULL,
    -- The device_list_version that senders see.
    head                bytea NOT NULL CHECK (octet_length(head) = 32),
    -- When a device was last added; null: none yet.
    identity_changed_at timestamptz
) WITH (fillfactor = 80);
