-- $1 root, $2 list, $3 its serial, $4 now. No row: the stored list has a higher serial, or the same with other bytes.
INSERT INTO revocations (root_public_key, revocations, serial, updated_at)
VALUES ($1, $2, $3, $4)
ON CONFLICT (root_public_key) DO UPDATE
SET revocations = excluded.revocations, serial = excluded.serial,
    version = revocations.version + 1, updated_at = excluded.updated_at
WHERE revocations.serial < excluded.serial OR revocations.revocations = excluded.revocations
RETURNING version
