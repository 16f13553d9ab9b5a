"""Errors a user can cause or meet; each message says what was found, where, and the remedy."""


class MolkdError(Exception):
    """Base of all errors that the command line shows as one line without a traceback."""

    exit_code = 1


class CacheError(MolkdError):
    """A store that cannot be used as asked: wrong format, teacher, dataset or signal."""


class IntegrityError(CacheError):
    """Stored bytes that are not what was written: damaged, cut off or mixed up."""

    exit_code = 3


class ConflictError(CacheError):
    """Another writer committed the same shard first, with other values."""
