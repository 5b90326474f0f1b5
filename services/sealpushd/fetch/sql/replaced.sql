-- Open deliveries whose place newer messages take. In: $1 new message ids, $2 their device ids, $3 their replace hashes.
-- Out: keys to close.
SELECT o.message_id, o.device_id
FROM unnest($1::uuid[], $2::uuid[], $3::bytea[]) AS i (message_id, device_id, replace_hash)
JOIN open_deliveries o ON o.device_id = i.device_id AND o.replace_hash = i.replace_hash AND o.message_id < i.message_id
