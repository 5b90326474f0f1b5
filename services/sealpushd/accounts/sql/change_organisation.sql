-- $1 login, $2 password hash or NULL (stays), $3 name, $4 networks, $5 now. Returns its id; no row: there is none yet.
UPDATE organisations
SET password_hash = COALESCE($2, password_hash), name = $3, networks = $4, version = version + 1, updated_at = $5, deleted_at = NULL
WHERE login = $1
RETURNING organisation_id
