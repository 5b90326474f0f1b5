-- Out: the journal's epoch, the newest transaction of which entries were dropped, and the present snapshot, and
-- whether the ends of all transactions that it knows are on disk.
SELECT epoch, dropped_xid::text::int8 AS dropped_xid, pg_current_snapshot()::text AS snapshot,
       pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn() AS is_flushed
FROM journal
