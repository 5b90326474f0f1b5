-- $1 sender ids, each once. What phones may know of them; unknown ones are left out.
SELECT s.sender_id, s.sender_entry, p.platform_entry, s.display_name, s.brand_colour, s.brand_text_colour, s.logo_png
FROM senders s
LEFT JOIN platform_entries p ON p.root_public_key = s.root_public_key
WHERE s.sender_id = ANY ($1::uuid[]) AND s.deleted_at IS NULL
