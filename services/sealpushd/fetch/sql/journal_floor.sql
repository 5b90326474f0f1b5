-- A number above which all numbers are of every transaction that a snapshot taken later does not know. Out: it.
-- The transaction id makes it so, and is taken second: what gets a higher one gets its numbers after the one read here; and as this
-- transaction ends before the later snapshot, all that is above that snapshot's end is above this id. A snapshot's end alone would
-- not do: transactions that already run may be above it.
-- The message is for the log's sake: with it the commit waits until the log is on disk, with the number and the id, so that neither is
-- given again after a crash.
WITH floor AS MATERIALIZED (
    SELECT last_value - CASE WHEN is_called THEN 0 ELSE 1 END AS seq FROM status_events_seq
)
SELECT seq, pg_current_xact_id()::text AS xid, pg_logical_emit_message(true, 'sealpush', '') FROM floor
