-- Identity keys of devices, removed ones included. In: $1 device ids.
SELECT device_id, identity_public_key FROM devices WHERE device_id = ANY ($1::uuid[])
