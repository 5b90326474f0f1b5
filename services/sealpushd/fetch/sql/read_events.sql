-- A page of the journal: what one snapshot sees and an earlier one does not, in the order of the numbers (docs/architecture.md).
-- In: $1 the snapshot up to which everything was read; $2 its floor: transactions that it does not know have numbers above;
--   $3 the snapshot that this step reads up to (null: a step begins, with the present one); $4 only after this number; $5 no number that $3
--   sees is above (null with $3); $6 how many at the most; $7 read nothing where numbers are above this already (null: read).
-- Out: the journal's epoch, the newest transaction of which entries are gone, the snapshot and the highest number of the step, whether the ends of
--   all transactions that a step begun here knows are on disk, whether $7 kept it from reading, and the events; one row without an event where
--   there is none.
WITH step AS MATERIALIZED (
    SELECT j.epoch, j.restored_seq, j.dropped_xid, $1::text::pg_snapshot AS done,
           coalesce($3::text::pg_snapshot, pg_current_snapshot()) AS up_to,
           -- Read after this statement's snapshot was taken: what that sees had its number before.
           coalesce($5::int8, (SELECT last_value - CASE WHEN is_called THEN 0 ELSE 1 END FROM status_events_seq)) AS until_seq,
           -- As above: what the snapshot knows was in the log before.
           pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn() AS is_flushed
    FROM journal j
), bounded AS MATERIALIZED (
    SELECT *, coalesce(until_seq > $7::int8, false) AS floor_is_old, CASE WHEN until_seq > $7::int8 THEN 0 ELSE $6::int8 END AS most FROM step
)
SELECT step.epoch, step.dropped_xid::text::int8 AS dropped_xid, step.up_to::text AS up_to, step.until_seq, step.is_flushed, step.floor_is_old, e.*
FROM bounded step LEFT JOIN LATERAL (
    (
        -- Of transactions that were running then: the only ones below the floor, however long they took.
        SELECT late.*
        FROM pg_snapshot_xip(step.done) AS running (xid) CROSS JOIN LATERAL (
            SELECT seq, at, message_id, device_id, sender_id, order_id, leg_no, group_id, channel, kind, state, reason
            FROM status_events
            WHERE xid = running.xid AND seq > $4::int8 AND seq <= $2::int8 AND seq > step.restored_seq
              AND pg_visible_in_snapshot(running.xid, step.up_to)
            ORDER BY xid, seq LIMIT step.most
        ) late
        ORDER BY seq LIMIT step.most
    )
    UNION ALL
    (
        SELECT seq, at, message_id, device_id, sender_id, order_id, leg_no, group_id, channel, kind, state, reason
        FROM status_events
        WHERE seq > greatest($2::int8, $4::int8) AND seq <= step.until_seq
          AND (seq <= step.restored_seq OR (pg_visible_in_snapshot(xid, step.up_to) AND NOT pg_visible_in_snapshot(xid, step.done)))
        ORDER BY seq LIMIT step.most
    )
    ORDER BY seq LIMIT step.most
) e ON true
ORDER BY e.seq
