-- $1 organisation id, $2 the sender that becomes its default, $3 now.
UPDATE senders SET is_default = false, version = version + 1, updated_at = $3
WHERE organisation_id = $1 AND is_default AND sender_id <> $2
