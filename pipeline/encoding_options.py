"""What --encoding says: [SIGNAL=]ENCODING, one for all features or one for each."""

from collections.abc import Collection, Sequence

from molkd.cache_schema.encoding import check_signal_encoding
from molkd.pipeline.errors import CacheError, ConfigError


def parse_encodings(items: Sequence[str], signals: Collection[str]) -> tuple[str, dict[str, str]]:
    """Return the encoding for all signals, "" if none is named, and those named for a signal.

    Parameters
    ----------
    items : as given, "int8" or "node=pca:64"; a later one wins
    signals : that may be named

    Raises
    ------
    ConfigError
        If an encoding is unknown, or named for a signal that is not among those.
    """
    general, named = "", {}
    for item in items:
        signal, _, encoding = item.rpartition("=")
        if not _is_known(encoding):
            raise ConfigError(
                f"--encoding {item}: choose fp32, fp16, int8 or pca:BYTES, alone or as SIGNAL=ENCODING"
            )
        if signal and signal not in signals:
            raise ConfigError(f"--encoding {item}: {signal} is not among the signals ({', '.join(signals)})")
        if signal:
            named[signal] = encoding
        else:
            general = encoding
    return general, named


def _is_known(encoding: str) -> bool:
    """Say whether features may be asked for in an encoding; double precision is for energies."""
    try:
        return check_signal_encoding(encoding, "--encoding") != "fp64"
    except CacheError:
        return False
