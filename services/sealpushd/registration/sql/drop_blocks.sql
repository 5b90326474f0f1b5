-- $1 subscriber id, $2 sender id. Blocks not yet worked off, which a newer decision replaces.
DELETE FROM pending_closures WHERE kind = 3 AND subscriber_id = $1 AND sender_id = $2
