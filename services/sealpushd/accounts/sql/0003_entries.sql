-- Every signed entry that was ever put, for receipts: a key that has left its entry since signed what was sent before. Rows are only added, in
-- the transaction that puts the entry.
CREATE TABLE entries (
    root_public_key bytea NOT NULL,
    -- As in the entry: 1 a sender's, 2 the platform's.
    role            smallint NOT NULL,
    -- Zeros for the platform: there is one a root, and each of its entries names itself anew.
    sender_id       uuid NOT NULL,
    serial          bigint NOT NULL,
    entry           bytea NOT NULL,
    put_at          timestamptz NOT NULL,
    PRIMARY KEY (sender_id, role, root_public_key, serial)
);

-- What was replaced before this is lost.
INSERT INTO entries (root_public_key, role, sender_id, serial, entry, put_at)
SELECT root_public_key, 1, sender_id, entry_serial, sender_entry, updated_at FROM senders
UNION ALL
SELECT root_public_key, 2, '00000000-0000-0000-0000-000000000000', entry_serial, platform_entry, updated_at FROM platform_entries;
