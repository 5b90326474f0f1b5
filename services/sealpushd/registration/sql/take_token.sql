-- $1 token hash, $2 the device that has it now. A token belongs to one installation: an app installed anew keeps its token and gets
-- a new device id, and must not be woken twice.
UPDATE installations SET push_token = NULL, push_token_lookup = NULL, token_registered_at = NULL
WHERE push_token_lookup = $1 AND device_id <> $2
