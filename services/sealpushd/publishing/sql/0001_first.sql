-- Publishing keeps no messages: the mailbox does. What is its own are the keys of its vault, which hash requests and replace keys.
CREATE TABLE vault_keys (
    name    text PRIMARY KEY,
    wrapped bytea NOT NULL
);
