-- What receipts need and what went with the content, or was only counted, until now (docs/receipts.md).

-- Head of the envelope, SHA-512 of its content part, signature: 254 bytes (sealpush.envelope.evidence_of), which verify without the content.
-- Written with the message and not when the content ends: the row is there anyway, while shrinking that of the content would write it
-- anew in each end. Beside `contents.head`, not instead of it: processes of the version before read that one while both run.
-- Null: nothing was sealed, or the message is from before this column.
ALTER TABLE messages ADD COLUMN evidence bytea;

ALTER TABLE deliveries
    -- The first acknowledgement after another end, as signed.
    ADD COLUMN late_ack_outcome   smallint,
    ADD COLUMN late_ack_reason    smallint,
    ADD COLUMN late_ack_at_ms     bigint,
    ADD COLUMN late_ack_signature bytea,
    -- That it was read, as signed; the outcome is READ and the reason 0.
    ADD COLUMN read_ack_at_ms     bigint,
    ADD COLUMN read_ack_signature bytea;
