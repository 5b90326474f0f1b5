"""Runnable peers with scriptable faults: strict APNs, FCM and HMS, and an SMS gateway that keeps what it delivers in memory."""
