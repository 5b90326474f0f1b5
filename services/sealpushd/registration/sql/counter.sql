-- $1 device id. Why a change was refused.
SELECT state, change_counter FROM installations WHERE device_id = $1
