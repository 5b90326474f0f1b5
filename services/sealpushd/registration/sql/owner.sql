-- $1 phone hash. Whom the number belongs to.
SELECT subscriber_id FROM identifiers WHERE kind = 1 AND scope = '' AND lookup_hmac = $1
