-- The journal is read in the order of its numbers, between two snapshots (docs/architecture.md, "The journal"). A reader of the version
-- before goes on with the index on (xid, seq). Making the index holds writers up for about a second a million entries, and no time where the
-- partitions have theirs already (docs/operations.md, "Restarting and upgrading").
CREATE INDEX ON status_events (seq);
GRANT SELECT ON SEQUENCE status_events_seq TO fetch_app;

-- What a position in the journal depends on.
CREATE TABLE journal_epoch (
    only_row     boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    -- Another one after each restore: transactions and numbers that were given since the back-up are given again.
    epoch        uuid NOT NULL DEFAULT gen_random_uuid(),
    -- Entries up to this number came out of a back-up. Their transactions may be another cluster's and mean nothing here.
    restored_seq bigint NOT NULL DEFAULT 0,
    -- The newest transaction of which entries were dropped with their partition. A position that has not read it misses them.
    dropped_xid  xid8 NOT NULL DEFAULT '0'
);
INSERT INTO journal_epoch DEFAULT VALUES;

-- The same with the cluster in its epoch: a dump that is restored elsewhere is another journal, also where nobody said so.
CREATE VIEW journal AS
SELECT substring(sha256(uuid_send(e.epoch) || int8send(c.system_identifier)) FOR 16) AS epoch, e.restored_seq, e.dropped_xid
FROM journal_epoch e CROSS JOIN pg_control_system() c;

-- As before, and writes down which transactions' entries go.
CREATE OR REPLACE FUNCTION drop_partitions(keep interval DEFAULT interval '90 days') RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = "fetch", pg_temp AS $$
DECLARE
    dropped int := 0;
    newest xid8;
    old record;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('fetch.partitions'));
    FOR old IN
        SELECT child.relname AS part, parent.relname AS parent
        FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid JOIN pg_class parent ON parent.oid = inhparent
        WHERE parent.relname IN ('messages', 'contents', 'deliveries', 'status_events')
          AND parent.relnamespace = 'fetch'::regnamespace
    LOOP
        -- The name ends in its ISO week.
        IF to_timestamp(right(old.part, 7), 'IYYY"w"IW') + interval '1 week'
           < now() - (CASE WHEN old.parent = 'contents' THEN interval '29 days' ELSE greatest(keep, interval '29 days') END) THEN
            IF old.parent = 'status_events' THEN
                -- Of what came out of a back-up the transaction says nothing here: who has read nothing yet misses it, nobody else.
                EXECUTE format(
                    'SELECT coalesce((SELECT xid FROM %1$I WHERE seq > $1 ORDER BY xid DESC, seq DESC LIMIT 1),'
                    ' (SELECT ''1''::xid8 FROM %1$I LIMIT 1))',
                    old.part
                ) INTO newest USING (SELECT restored_seq FROM journal_epoch);
                UPDATE journal_epoch SET dropped_xid = greatest(dropped_xid, newest) WHERE newest IS NOT NULL;
            END IF;
            EXECUTE format('DROP TABLE %I', old.part);
            dropped := dropped + 1;
        END IF;
    END LOOP;
    DELETE FROM accepted_requests WHERE expires_at < now();
    RETURN dropped;
END $$;
