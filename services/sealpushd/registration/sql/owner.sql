-- $1 phone hash. Whom the number belongs to, and its lock, NULLs: none.
SELECT i.subscriber_id, l.pin_hash, l.wrong_pins, l.last_wrong_at
FROM identifiers i
LEFT JOIN registration_locks l ON l.subscriber_id = ANY (ARRAY[i.subscriber_id])
WHERE i.kind = 1 AND i.scope = '' AND i.lookup_hmac = $1
