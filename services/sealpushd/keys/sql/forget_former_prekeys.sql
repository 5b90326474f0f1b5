-- Forgets the signed prekey of a device that was current before: senders hold it no longer. The caller has locked the device.
-- In: $1 device. Out: nothing.
DELETE FROM signed_prekeys WHERE device_id = $1 AND NOT is_current
