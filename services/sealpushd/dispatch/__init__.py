"""Dispatch: takes wake-ups from the mailbox and hands them to the push services."""
