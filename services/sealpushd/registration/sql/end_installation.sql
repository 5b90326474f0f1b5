-- $1 device id, $2 subscriber id, $3 now. Changes nothing where the installation is another subscriber's or has ended.
UPDATE installations
SET updated_at = $3, state = 2, is_primary = false, push_token = NULL, push_token_lookup = NULL, token_registered_at = NULL
WHERE device_id = $1 AND subscriber_id = $2 AND state = 1
