-- $1 subscriber id.
DELETE FROM preferences WHERE subscriber_id = $1
