-- Takes devices out of their lists, prekeys and all. In: $1 device ids, $2 now. Out: nothing.
WITH signed AS (
    DELETE FROM signed_prekeys WHERE device_id = ANY ($1::uuid[])
), one_time AS (
    DELETE FROM one_time_prekeys WHERE device_id = ANY ($1::uuid[])
), handed_out AS (
    DELETE FROM handouts WHERE device_id = ANY ($1::uuid[])
)
UPDATE devices SET removed_at = $2::timestamptz WHERE device_id = ANY ($1::uuid[])
