-- Of a device's one-time prekeys that were handed out, the one with the highest id; no row: none. In: $1 device.
SELECT suite, prekey FROM handouts WHERE device_id = $1 ORDER BY prekey_id DESC LIMIT 1
