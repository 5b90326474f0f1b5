-- $1 device id, $2 counter, $3 now. No row: the counter was used, or the installation has ended.
UPDATE installations SET change_counter = $2, updated_at = $3, last_seen_at = $3
WHERE device_id = $1 AND state = 1 AND change_counter < $2
RETURNING subscriber_id
