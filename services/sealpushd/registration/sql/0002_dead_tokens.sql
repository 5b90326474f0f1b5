-- When it was learnt that the push service calls the installation's token dead; the token itself is forgotten with it. Null: nothing is
-- known against it. The app's next word about its token, with one or without, and registering anew make it null again.
-- NOT VALID: every row of now has a null and need not be read for it.
ALTER TABLE installations
    ADD COLUMN token_gone_at timestamptz,
    ADD CONSTRAINT installations_gone_or_token CHECK (token_gone_at IS NULL OR push_token IS NULL) NOT VALID;
