-- $1 sender id, $2 organisation id, $3 name, $4 entry, $5 its serial, $6 display name, $7 root, $8 colour, $9 text colour,
-- $10 logo or NULL (stays), $11 scopes, $12 default, $13 now.
-- No row: the sender is another organisation's, or the stored entry has a higher serial, or the same with other bytes.
INSERT INTO senders (sender_id, organisation_id, name, sender_entry, entry_serial, display_name, root_public_key,
                     brand_colour, brand_text_colour, logo_png, scopes, is_default, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $13)
ON CONFLICT (sender_id) DO UPDATE
SET name = excluded.name, sender_entry = excluded.sender_entry, entry_serial = excluded.entry_serial,
    display_name = excluded.display_name, root_public_key = excluded.root_public_key, brand_colour = excluded.brand_colour,
    brand_text_colour = excluded.brand_text_colour, logo_png = COALESCE(excluded.logo_png, senders.logo_png),
    scopes = excluded.scopes, is_default = excluded.is_default, version = senders.version + 1,
    updated_at = excluded.updated_at, deleted_at = NULL
WHERE senders.organisation_id = excluded.organisation_id
  AND (senders.entry_serial < excluded.entry_serial OR senders.sender_entry = excluded.sender_entry)
RETURNING version
