-- $1 phone hash, $2 phone, $3 subscriber id, $4 now.
INSERT INTO identifiers (kind, scope, lookup_hmac, ciphertext, subscriber_id, bound_at)
VALUES (1, '', $1, $2, $3, $4)
ON CONFLICT (kind, scope, lookup_hmac) DO UPDATE SET subscriber_id = excluded.subscriber_id, bound_at = excluded.bound_at
WHERE identifiers.subscriber_id <> excluded.subscriber_id
