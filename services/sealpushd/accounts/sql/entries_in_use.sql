-- Every entry that is in use: senders', and the platform's with sender_id NULL.
SELECT sender_id, root_public_key, sender_entry AS entry FROM senders WHERE deleted_at IS NULL
UNION ALL
SELECT NULL, root_public_key, platform_entry FROM platform_entries
