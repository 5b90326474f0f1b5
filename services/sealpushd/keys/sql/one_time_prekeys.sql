-- One-time prekeys of a device, a row a suite. In: $1 device id.
SELECT suite, first_index, next_index, blob FROM one_time_prekeys WHERE device_id = $1
