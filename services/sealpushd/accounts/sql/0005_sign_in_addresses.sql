-- From where an organisation signed in lately. Others' wrong passwords lock no such address out. Rows go when they ended, and the oldest when
-- there are too many.
CREATE TABLE sign_in_addresses (
    organisation_id uuid NOT NULL REFERENCES organisations,
    -- Keyed hash of address, organisation and password, by a key that lies outside the database: another password knows none of them.
    address_hmac    bytea NOT NULL CHECK (length(address_hmac) = 32),
    signed_in_at    timestamptz NOT NULL,
    PRIMARY KEY (organisation_id, address_hmac)
);
CREATE INDEX sign_in_addresses_age ON sign_in_addresses (signed_in_at);
