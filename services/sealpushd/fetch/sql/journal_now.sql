-- Out: the journal's epoch, the newest transaction of which entries were dropped, and the present snapshot.
SELECT epoch, dropped_xid::text::int8 AS dropped_xid, pg_current_snapshot()::text AS snapshot FROM journal
