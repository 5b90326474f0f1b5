-- $1 logins. A row a sender of each organisation, one with sender_id NULL when it has none; no row: no such login.
SELECT o.login, o.organisation_id, o.password_hash, o.networks, s.sender_id, s.name, s.scopes, s.is_default,
       ARRAY(SELECT a.app_id FROM sender_apps a WHERE a.sender_id = s.sender_id ORDER BY a.position) AS app_ids
FROM organisations o
LEFT JOIN senders s ON s.organisation_id = o.organisation_id AND s.deleted_at IS NULL
WHERE o.login = ANY($1::text[]) AND o.deleted_at IS NULL
