-- $1 organisation id. Keeps two changes of its senders apart; no row: no such organisation.
SELECT 1 FROM organisations WHERE organisation_id = $1 AND deleted_at IS NULL FOR UPDATE
