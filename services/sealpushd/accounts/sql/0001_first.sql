-- Settings rows have UUID keys, a version that rises with every change, and are deleted by setting deleted_at: standby
-- installations will copy them by version.

CREATE TABLE organisations (
    organisation_id uuid PRIMARY KEY,
    login text NOT NULL UNIQUE,
    -- Argon2id in PHC format. Never leaves the service.
    password_hash text NOT NULL,
    name text NOT NULL,
    -- CIDR networks the organisation calls from; empty: any. Checked at sign-in, and on each call by the token.
    networks text[] NOT NULL DEFAULT '{}',
    -- Roles of whoever signs in by this login, for user administration; empty: sender only.
    roles text[] NOT NULL DEFAULT '{}',
    version bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    deleted_at timestamptz
);

CREATE TABLE apps (
    app_uuid uuid PRIMARY KEY,
    app_id text NOT NULL UNIQUE,
    name text NOT NULL,
    -- Ed25519 root the app pins.
    root_public_key bytea NOT NULL CHECK (length(root_public_key) = 32),
    apns_topic text NOT NULL DEFAULT '',
    version bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    deleted_at timestamptz
);

CREATE TABLE senders (
    sender_id uuid PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    name text NOT NULL,
    -- Root-signed; display_name, serial and root are read out of it when it is put.
    sender_entry bytea NOT NULL,
    entry_serial bigint NOT NULL,
    display_name text NOT NULL,
    root_public_key bytea NOT NULL,
    brand_colour text NOT NULL DEFAULT '',
    brand_text_colour text NOT NULL DEFAULT '',
    logo_png bytea,
    scopes text[] NOT NULL,
    is_default boolean NOT NULL DEFAULT false,
    version bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    deleted_at timestamptz
);
CREATE UNIQUE INDEX senders_name ON senders (organisation_id, name) WHERE deleted_at IS NULL;
CREATE UNIQUE INDEX senders_default ON senders (organisation_id) WHERE is_default AND deleted_at IS NULL;

-- Which sender may send to which app; position 1 is its default.
CREATE TABLE sender_apps (
    sender_id uuid NOT NULL REFERENCES senders,
    app_id text NOT NULL REFERENCES apps (app_id),
    position int NOT NULL,
    PRIMARY KEY (sender_id, app_id)
);

-- The root-signed entry of the platform's sealing key, one a root.
CREATE TABLE platform_entries (
    root_public_key bytea PRIMARY KEY,
    platform_entry bytea NOT NULL,
    entry_serial bigint NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    updated_at timestamptz NOT NULL
);

-- Who changed what. Appended in the transaction of the change; holds no secret.
CREATE TABLE journal (
    entry_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL,
    actor text NOT NULL,
    action text NOT NULL,
    subject text NOT NULL,
    detail jsonb NOT NULL
);
CREATE INDEX journal_subject ON journal (subject, entry_id);

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
