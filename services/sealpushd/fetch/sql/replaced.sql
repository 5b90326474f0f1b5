-- Open deliveries whose place newer messages take. In: $1 new message ids, $2 their device ids, $3 their replace hashes.
-- Out: keys to close.
SELECT o.message_id, o.device_id
FROM unnest($1::uuid[], $2::uuid[], $3::bytea[]) AS i (message_id, device_id, replace_hash)
CROSS JOIN LATERAL (
    SELECT message_id, device_id FROM open_deliveries
    WHERE device_id = i.device_id AND replace_hash = i.replace_hash AND message_id < i.message_id
    OFFSET 0
) o
