-- Credentials of the push services are put by operators (the Providers calls) and read by every dispatch process. A secret is stored
-- here, encrypted by the vault in the context "providers.secret " and the row's id, or lies in a file that is mounted.

ALTER TABLE providers
    ALTER COLUMN secret DROP NOT NULL,
    -- Its name in the folder that SEALPUSH_CREDENTIALS names.
    ADD COLUMN secret_file text,
    -- When it ends, as the operator said; null: nobody said.
    ADD COLUMN expires_at timestamptz,
    ADD CONSTRAINT providers_one_secret CHECK ((secret IS NULL) <> (secret_file IS NULL));
