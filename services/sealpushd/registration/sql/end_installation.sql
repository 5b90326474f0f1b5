-- $1 device id, $2 counter, $3 now. No row: the counter was used, or the installation has ended.
UPDATE installations
SET change_counter = $2, updated_at = $3, state = 2, is_primary = false,
    push_token = NULL, push_token_lookup = NULL, token_registered_at = NULL
WHERE device_id = $1 AND state = 1 AND change_counter < $2
RETURNING subscriber_id
