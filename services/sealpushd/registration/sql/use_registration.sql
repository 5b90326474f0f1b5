-- $1 registration id, $2 device id, $3 now. No row: another device used it.
UPDATE registrations SET used_by_device_id = $2, used_at = COALESCE(used_at, $3)
WHERE registration_id = $1 AND (used_by_device_id IS NULL OR used_by_device_id = $2)
RETURNING registration_id
