"""The error that readers and protocols raise for unusable data."""


class DataError(ValueError):
    """The data do not allow the operation; the message names the file or array."""
