-- $1 device ids, $2 now. They lost their number to a new person.
UPDATE installations
SET state = 3, is_primary = false, push_token = NULL, push_token_lookup = NULL, token_registered_at = NULL, updated_at = $2
WHERE device_id = ANY ($1::uuid[]) AND state = 1
