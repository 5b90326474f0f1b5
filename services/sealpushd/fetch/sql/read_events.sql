-- The journal after a position, in commit order. In: $1 xid, $2 seq of the last event read, $3 how many at the most.
SELECT xid::text::int8 AS xid, seq, at, message_id, device_id, sender_id, order_id, leg_no, group_id, channel, kind, state, reason
FROM status_events
WHERE (xid, seq) > ($1::text::xid8, $2::int8) AND xid < pg_snapshot_xmin(pg_current_snapshot())
ORDER BY xid, seq
LIMIT $3
