-- $1 id, $2 login, $3 password hash, $4 name, $5 networks, $6 now. No row: somebody else just made it.
INSERT INTO organisations (organisation_id, login, password_hash, name, networks, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $6)
ON CONFLICT (login) DO NOTHING
RETURNING organisation_id
