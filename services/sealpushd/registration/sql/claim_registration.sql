-- $1 registration id, $2 device id: of all that give its code at once, or after one another, one may come into a device log. No row: the
-- code is another device's, or was used.
UPDATE registrations SET used_by_device_id = $2
WHERE registration_id = $1 AND used_at IS NULL AND (used_by_device_id IS NULL OR used_by_device_id = $2)
RETURNING registration_id
