"""The one exception of the embedded engines."""


class EngineError(Exception):
    """An embedded server cannot be had; the message says what happened and what to do about it."""
