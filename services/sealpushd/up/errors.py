class UpError(Exception):
    """`sealpush up` cannot go on. The message says why and what to do about it."""
