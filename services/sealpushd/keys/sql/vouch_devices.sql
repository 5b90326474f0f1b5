-- Notes that these devices were vouched for. The caller has locked them. In: $1 device ids. Out: nothing.
UPDATE devices SET recovered = false WHERE device_id = ANY ($1::uuid[])
