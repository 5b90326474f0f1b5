-- Drops rows of devices that this transaction made and then refused. In: $1 device ids. Out: nothing.
DELETE FROM devices WHERE device_id = ANY ($1::uuid[])
