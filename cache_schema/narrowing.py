"""From values as the teacher gives them to rows as they are stored, and the sums that records keep."""

from typing import Any

from array_api_compat import array_namespace

from molkd.cache_schema.codebook import decode_rows, encode_rows
from molkd.cache_schema.encoding import ENCODINGS
from molkd.cache_schema.layout import SCALE
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.statistics import Moments, measure, n_channels


def narrow(signal: Signal, values: Any, keep: Any, held_out: Any | None) -> tuple[dict[str, Any], Moments]:
    """Return stored rows by array, and sums, of NumPy or torch arrays on the device where they lie.

    Rows that are not kept read as NaN. A value too large for the encoding becomes infinite, or its scale
    does; whoever writes the rows refuses them.

    Parameters
    ----------
    values : (n, *shape)
    keep : (n,) bool, False for rows of systems that are given up
    held_out : (n,) bool, rows that a fitted encoding was not fitted to; None if it is not fitted
    """
    xp = array_namespace(values)
    values = xp.where(
        xp.reshape(keep, (-1, *[1] * (len(values.shape) - 1))), values, xp.full_like(values, xp.nan)
    )
    if signal.codebook is not None:
        codes, scale = encode_rows(values, signal.codebook)
        stored, decoded = {"values": codes, SCALE: scale}, decode_rows(codes, scale, signal.codebook)
    else:
        narrowed = xp.astype(values, getattr(xp, ENCODINGS[signal.encoding].dtype), copy=False)
        stored = {"values": narrowed}
        decoded = values if narrowed.dtype == values.dtype else xp.astype(narrowed, values.dtype)
    return stored, measure(values, decoded, keep, held_out, n_channels(signal.spec))
