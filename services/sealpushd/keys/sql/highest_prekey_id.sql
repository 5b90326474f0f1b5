-- The highest id among the signed prekeys of a device and its one-time prekeys that were handed out; 0: none. In: $1 device.
SELECT greatest(
    (SELECT max(prekey_id) FROM signed_prekeys WHERE device_id = $1),
    (SELECT max(prekey_id) FROM handouts WHERE device_id = $1),
    0
) AS prekey_id
