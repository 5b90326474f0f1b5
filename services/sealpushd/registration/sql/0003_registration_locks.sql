-- A recipient's PIN against whoever takes over its number; no row: no lock.
CREATE TABLE registration_locks (
    subscriber_id uuid PRIMARY KEY REFERENCES subscribers,
    -- Argon2id over the vault's keyed hash of the PIN: the database alone does not even allow guessing.
    pin_hash bytea NOT NULL,
    set_at timestamptz NOT NULL,
    -- Since they were last forgotten; the right PIN forgets them, too.
    wrong_pins smallint NOT NULL DEFAULT 0,
    last_wrong_at timestamptz,
    CHECK (wrong_pins = 0 OR last_wrong_at IS NOT NULL)
);
