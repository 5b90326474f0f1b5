-- $1 roots, each once. Those without a list are left out.
SELECT root_public_key, revocations FROM revocations WHERE root_public_key = ANY ($1::bytea[])
