"""Accepting messages from senders, and telling them what became of each."""
