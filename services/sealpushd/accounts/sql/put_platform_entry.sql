-- $1 root, $2 entry, $3 its serial, $4 now. No row: the stored entry has a higher serial, or the same with other bytes.
INSERT INTO platform_entries (root_public_key, platform_entry, entry_serial, updated_at)
VALUES ($1, $2, $3, $4)
ON CONFLICT (root_public_key) DO UPDATE
SET platform_entry = excluded.platform_entry, entry_serial = excluded.entry_serial,
    version = platform_entries.version + 1, updated_at = excluded.updated_at
WHERE platform_entries.entry_serial < excluded.entry_serial OR platform_entries.platform_entry = excluded.platform_entry
RETURNING version
