-- $1 subscriber id, $2 sender id, $3 block all, $4 block advertising, $5 mute, $6 now.
INSERT INTO preferences (subscriber_id, sender_id, block_all, block_advertising, mute, updated_at) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (subscriber_id, sender_id) DO UPDATE
SET block_all = excluded.block_all, block_advertising = excluded.block_advertising, mute = excluded.mute,
    updated_at = excluded.updated_at
