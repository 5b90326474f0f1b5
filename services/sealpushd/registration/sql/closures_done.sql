-- $1 closure ids. A device whose old deliveries are closed receives again.
WITH gone AS (
    DELETE FROM pending_closures WHERE closure_id = ANY ($1::bigint[]) RETURNING closure_id, kind, device_id
)
UPDATE installations i SET held = false
FROM gone
WHERE gone.kind = 1 AND i.device_id = ANY (ARRAY[gone.device_id]) AND i.held
  AND NOT EXISTS (
      SELECT 1 FROM pending_closures o
      WHERE o.kind = 1 AND o.device_id = i.device_id AND o.closure_id <> ALL ($1::bigint[]) OFFSET 0
  )
