-- Uses up a change counter of a device. In: $1 device, $2 counter, $3 lowest suite as the caller knows it, $4 lowest suite from now on.
-- Out: one row if the counter was new and nothing changed meanwhile, else none. The row stays locked.
UPDATE devices SET change_counter = $2, min_suite = $4
WHERE device_id = $1 AND change_counter < $2 AND min_suite = $3 AND removed_at IS NULL
RETURNING device_id
