"""Runnable peers with scriptable faults: a strict APNs and an SMS gateway that keeps what it delivers in memory."""
