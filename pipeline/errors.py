"""User errors of the pipeline; `molkd.cli` turns them into one line and an exit code."""

from molkd.cache_schema.errors import CacheError, IntegrityError, MolkdError

__all__ = [
    "BusyError",
    "CacheError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "IntegrityError",
    "ModelError",
    "MolkdError",
    "TeacherError",
]


class DataError(MolkdError):
    """Structures or labels that cannot be read or make no sense; names file and system."""


class ConfigError(MolkdError):
    """A setting that does not exist or does not fit; names the nearest valid one."""


class BusyError(ConfigError):
    """A folder in which another process is at work."""


class ModelError(MolkdError):
    """A model that cannot be built, loaded or applied as asked."""


class DivergedError(ModelError):
    """A run whose loss is not finite any more."""


class TeacherError(MolkdError):
    """A teacher that cannot be loaded, or that does not give what was asked."""
