-- Arrays of one length: $1 kinds, $2 subscriber ids, $3 device ids, $4 sender ids, $5 reasons, $6 advertising only; $7 now, $8 when to
-- try again should the attempt right after the commit fail. Returns their ids in the order of the arrays.
INSERT INTO pending_closures (kind, subscriber_id, device_id, sender_id, reason_code, advertising_only, attempts, created_at, next_attempt_at)
SELECT kind, subscriber_id, device_id, sender_id, reason_code, advertising_only, 1, $7, $8
FROM unnest($1::smallint[], $2::uuid[], $3::uuid[], $4::uuid[], $5::int[], $6::boolean[])
     WITH ORDINALITY AS q (kind, subscriber_id, device_id, sender_id, reason_code, advertising_only, n)
ORDER BY n
RETURNING closure_id
