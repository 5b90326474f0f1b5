-- Takes back what was handed out of a device. The caller has locked it. In: $1 device. Out: nothing.
DELETE FROM handouts WHERE device_id = $1
