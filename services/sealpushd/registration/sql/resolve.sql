-- Arrays of one length, an element a query: $1 kinds, $2 scopes, $3 lookups, $4 app ids, $5 sender ids.
-- A row for each installation of the app that the recipient has or had, numbered by its query (n, from 1) and in their order; one
-- with device_id NULL where the recipient has none of that app; no row where nobody is known.
-- The order of the columns is the order of rules.Row.
SELECT q.n, i.subscriber_id, p.block_all, p.block_advertising, p.mute,
       d.device_id, d.platform, d.state = 1 AND NOT d.held, d.is_primary, d.subscriptions,
       d.push_allowed_by_os, d.push_allowed_by_app, d.push_token_lookup IS NOT NULL, d.token_gone_at IS NOT NULL
FROM unnest($1::smallint[], $2::text[], $3::bytea[], $4::text[], $5::uuid[])
     WITH ORDINALITY AS q (kind, scope, lookup_hmac, app_id, sender_id, n)
JOIN identifiers i ON i.kind = ANY (ARRAY[q.kind]) AND i.scope = q.scope AND i.lookup_hmac = q.lookup_hmac
LEFT JOIN LATERAL (SELECT * FROM preferences WHERE subscriber_id = i.subscriber_id AND sender_id = q.sender_id OFFSET 0) p ON true
LEFT JOIN installations d ON d.subscriber_id = ANY (ARRAY[i.subscriber_id]) AND (d.app_id = q.app_id) IS TRUE
ORDER BY q.n, d.device_id
