"""Who may send: organisations, their senders and apps, credentials, brand, certificates, and the journal of changes."""
