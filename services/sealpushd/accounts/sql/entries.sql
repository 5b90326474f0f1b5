-- Entries that may have been in force at a moment, the likeliest first: those put by then, the newest first, then those put later.
-- In, an element a question: $1 its number, $2 role, $3 sender id (zeros for the platform), $4 root (null: any), $5 moment;
--   $6 how many a question at the most. Out: question, root, entry.
SELECT q.question, e.root_public_key, e.entry
FROM unnest($1::int4[], $2::int2[], $3::uuid[], $4::bytea[], $5::timestamptz[]) AS q (question, role, sender_id, root_public_key, moment)
CROSS JOIN LATERAL (
    SELECT root_public_key, entry, row_number() OVER (
        ORDER BY put_at > q.moment, CASE WHEN put_at > q.moment THEN serial ELSE -serial END
    ) AS place
    FROM entries
    WHERE sender_id = q.sender_id AND role = q.role AND (q.root_public_key IS NULL OR root_public_key = q.root_public_key)
    ORDER BY place LIMIT $6
) e
ORDER BY q.question, e.place
