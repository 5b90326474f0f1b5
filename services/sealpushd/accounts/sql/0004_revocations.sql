-- The newest revocation list of a root, one a root (layout: sealpush.revocations).
CREATE TABLE revocations (
    root_public_key bytea PRIMARY KEY CHECK (length(root_public_key) = 32),
    revocations bytea NOT NULL,
    serial bigint NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    updated_at timestamptz NOT NULL
);
