"""Public keys of devices, the log of who has which device, and sealing for senders that leave it to the platform."""
