-- One-time prekeys are handed out from now on. Nothing was ever written to the table of 0001, so it is made anew.
DROP TABLE handouts;

-- Which one-time prekey a sender got for a request: asking again gives the same one, so a lost answer burns nothing; and a stanza that
-- was sealed to it is accepted from nobody else. There is no row where the signed prekey was given alone: every row took a key off a
-- device's stock, so that the rate of handouts bounds the table. Whoever writes here has locked the device.
CREATE TABLE handouts (
    sender_id  uuid NOT NULL,
    request_id text COLLATE "C" NOT NULL,
    device_id  uuid NOT NULL,
    suite      smallint NOT NULL,
    -- Unsigned 32 bits; stanzas name a key by it.
    prekey_id  bigint NOT NULL,
    -- The record of the key as it stood in the blob, which forgets it.
    prekey     bytea NOT NULL,
    -- One lifetime of handouts after it was given: it also says when that was.
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (sender_id, request_id, device_id),
    -- Never one key for two, whatever else goes wrong.
    UNIQUE (device_id, suite, prekey_id)
);
-- How many a sender got of a device lately.
CREATE INDEX ON handouts (device_id, sender_id, expires_at);
-- For the sweep. Not BRIN: freed pages are filled with new rows, and its ranges would soon span everything.
CREATE INDEX ON handouts (expires_at);

COMMENT ON COLUMN one_time_prekeys.next_index IS
    'Index of the next key to hand out. What lies before it in the blob was handed out or had expired.';

-- Forget handouts that are over, at most so many: the caller goes on while it is that many. Waits for nobody. Out: how many.
CREATE FUNCTION sweep_handouts(most int, as_of timestamptz DEFAULT now()) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = keys, pg_temp AS $$
DECLARE
    swept int;
BEGIN
    DELETE FROM handouts WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM handouts WHERE expires_at <= as_of ORDER BY expires_at LIMIT most FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS swept = ROW_COUNT;
    RETURN swept;
END $$;
