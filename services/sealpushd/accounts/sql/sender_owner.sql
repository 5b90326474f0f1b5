-- $1 sender id. Whose it is.
SELECT organisation_id FROM senders WHERE sender_id = $1
