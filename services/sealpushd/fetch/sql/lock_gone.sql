-- Find and lock what is open for devices whose token the push service called dead, in the order of `lock_keys`; what a grace was given to
-- already is left out. A report with another session or fence than the lease's counts for nothing; one whose delivery has ended since,
-- because it was cancelled, say, tells of the token all the same, as long as its session lives.
-- In: $1 session; an element a report: $2 message, $3 device, $4 fence; $5 device and $6 message to begin after, $7 how many at the most.
-- Out: device, message.
WITH gone AS MATERIALIZED (
    SELECT DISTINCT g.device_id
    FROM unnest($2::uuid[], $3::uuid[], $4::int8[]) AS g (message_id, device_id, fence)
    LEFT JOIN open_deliveries o ON o.device_id = ANY (ARRAY[g.device_id]) AND o.message_id = g.message_id
    WHERE (o.session_id = $1 AND o.fence = g.fence)
       OR (o.device_id IS NULL AND EXISTS (SELECT FROM wake_up_sessions s WHERE s.session_id = $1))
)
SELECT o.device_id, o.message_id
FROM gone g JOIN open_deliveries o ON o.device_id = ANY (ARRAY[g.device_id])
WHERE (o.device_id, o.message_id) > ($5::uuid, $6::uuid) AND o.close_reason <> 105
ORDER BY o.device_id, o.message_id LIMIT $7
FOR UPDATE OF o
