-- Numbers, other identifiers and push tokens are encrypted by the vault and found by its keyed hash (32 bytes).

CREATE TABLE vault_keys (
    name text PRIMARY KEY,
    wrapped bytea NOT NULL
);

-- A person, as far as this installation knows.
CREATE TABLE subscribers (
    subscriber_id uuid PRIMARY KEY,
    created_at timestamptz NOT NULL
);

-- What a person is addressed by. kind: 1 phone, 2 rnokpp, 3 external user id. scope: empty, or the sender (hex) whose id it is.
CREATE TABLE identifiers (
    kind smallint NOT NULL,
    scope text NOT NULL,
    lookup_hmac bytea NOT NULL,
    ciphertext bytea NOT NULL,
    subscriber_id uuid NOT NULL REFERENCES subscribers,
    bound_at timestamptz NOT NULL,
    PRIMARY KEY (kind, scope, lookup_hmac)
);
CREATE INDEX identifiers_subscriber ON identifiers (subscriber_id);

-- One app on one phone. A row stays when the installation ends: its device id belongs to its identity key for ever.
CREATE TABLE installations (
    device_id uuid PRIMARY KEY,
    subscriber_id uuid NOT NULL REFERENCES subscribers,
    app_id text NOT NULL,
    -- Open enum sealpush.v1.Platform.
    platform smallint NOT NULL,
    -- 1 production, 2 sandbox.
    push_environment smallint NOT NULL,
    push_topic text NOT NULL,
    push_token bytea,
    push_token_lookup bytea,
    token_registered_at timestamptz,
    push_allowed_by_os boolean NOT NULL,
    push_allowed_by_app boolean NOT NULL,
    -- 1 active, 2 unregistered, 3 unbound because its number got a new owner.
    state smallint NOT NULL,
    -- Moved here from another subscriber, whose deliveries to this device are not closed yet: it receives nothing until they are.
    held boolean NOT NULL DEFAULT false,
    is_primary boolean NOT NULL,
    subscriptions text[] NOT NULL,
    app_version text NOT NULL,
    locale text NOT NULL,
    identity_public_key bytea NOT NULL CHECK (length(identity_public_key) = 32),
    change_counter bigint NOT NULL DEFAULT 0,
    -- Issue time of the newest challenge that was answered, microseconds since 1970.
    last_challenge_us bigint NOT NULL DEFAULT 0,
    -- The registration that bound it last.
    registration_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    -- Last registration, change or authentication: tells phones in use from forgotten ones.
    last_seen_at timestamptz NOT NULL,
    CHECK ((push_token IS NULL) = (push_token_lookup IS NULL) AND (push_token IS NULL) = (token_registered_at IS NULL))
);
CREATE INDEX installations_subscriber ON installations (subscriber_id, app_id);
CREATE INDEX installations_token ON installations (push_token_lookup) WHERE push_token_lookup IS NOT NULL;
CREATE UNIQUE INDEX installations_primary ON installations (subscriber_id, app_id) WHERE is_primary;

-- What a recipient decided about a sender; no row: nothing.
CREATE TABLE preferences (
    subscriber_id uuid NOT NULL REFERENCES subscribers,
    sender_id uuid NOT NULL,
    block_all boolean NOT NULL,
    block_advertising boolean NOT NULL,
    mute boolean NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (subscriber_id, sender_id)
);

-- Attempts to prove a number. Rows go a day after they ended.
CREATE TABLE registrations (
    registration_id uuid PRIMARY KEY,
    app_id text NOT NULL,
    phone_lookup bytea NOT NULL,
    phone bytea NOT NULL,
    -- Keyed hash of registration id and code.
    code_hash bytea NOT NULL,
    attempts_left smallint NOT NULL,
    -- The subscriber to make if the number has none: chosen here, so that a repeated confirmation chooses the same.
    new_subscriber_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    used_by_device_id uuid,
    used_at timestamptz
);
CREATE INDEX registrations_number ON registrations (phone_lookup, app_id, created_at);
CREATE INDEX registrations_expiry ON registrations (expires_at);

-- What other services must still be told after a commit here. kind: 1 close a device's deliveries (mailbox), 2 take a device out
-- of its subscriber's log (keys), 3 end a blocked sender's deliveries (mailbox). A row goes when the peer has answered.
CREATE TABLE pending_closures (
    closure_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind smallint NOT NULL,
    subscriber_id uuid NOT NULL,
    device_id uuid,
    sender_id uuid,
    reason_code int NOT NULL DEFAULT 0,
    advertising_only boolean NOT NULL DEFAULT false,
    attempts int NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL,
    next_attempt_at timestamptz NOT NULL
);
CREATE INDEX pending_closures_due ON pending_closures (next_attempt_at);
CREATE INDEX pending_closures_device ON pending_closures (device_id) WHERE device_id IS NOT NULL;

-- Rate limits while Valkey is away (platform/limits.py).
CREATE TABLE limit_counts (
    name text NOT NULL,
    subject bytea NOT NULL,
    in_window bigint NOT NULL,
    counted int NOT NULL,
    ends_at timestamptz NOT NULL,
    PRIMARY KEY (name, subject, in_window)
);
CREATE INDEX limit_counts_ends ON limit_counts (ends_at);
