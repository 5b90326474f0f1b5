"""Clients of the push services, all of one shape."""
