-- $1 sender ids. Unknown and deleted ones are left out.
SELECT s.sender_id, s.organisation_id, s.name, s.sender_entry, s.root_public_key, p.platform_entry,
       ARRAY(SELECT a.app_id FROM sender_apps a WHERE a.sender_id = s.sender_id ORDER BY a.position) AS app_ids
FROM senders s
LEFT JOIN platform_entries p ON p.root_public_key = s.root_public_key
WHERE s.sender_id = ANY ($1::uuid[]) AND s.deleted_at IS NULL
