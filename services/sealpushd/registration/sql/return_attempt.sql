-- $1 registration id: the code was right, so no attempt was lost.
UPDATE registrations SET attempts_left = attempts_left + 1 WHERE registration_id = $1
