-- Ends when the log is on disk as far as it reached when this began (docs/architecture.md, "The journal"). What is written is nothing but the
-- reason for its commit to wait.
SELECT pg_logical_emit_message(true, 'sealpush', '')
