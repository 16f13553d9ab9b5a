"""What to store where not everything fits: narrower encodings first, then fewer signals."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from molkd.cache_schema.encoding import encoding_for
from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.encodings import CHOOSE, narrower

# What goes first when even the narrowest encodings are too much; labels and `node` stay.
_DROPPED = ("edge", "layer/", "v2v", "e2n")


@dataclass(frozen=True)
class Proposal:
    """Signals and encodings that fit a budget, and what they need."""

    encodings: dict[str, str]  # signal -> encoding
    total_bytes: int
    dropped: tuple[str, ...]
    fits: bool
    flags: str  # what to add to the command: every encoding by name, whatever the default
    # Of each feature not yet stored, its relative rms error on the probe; None: cannot hold the values.
    errors: dict[str, float | None] = field(default_factory=dict)


def propose(
    specs: Mapping[str, FieldSpec],
    encodings: Mapping[str, str],
    sizes: Mapping[str, Mapping[str, float]],
    fixed_bytes: float,
    budget: int,
) -> Proposal:
    """Return what of the signals asked for fits `budget` bytes, and how to store it.

    The signal that takes most room is narrowed, again and again; if that is not enough signals are left out.

    Parameters
    ----------
    specs, encodings : of the signals asked for
    sizes : signal -> encoding -> bytes in all; a signal with one encoding only stays as it is
    fixed_bytes : of what is stored in any case: structures, labels, what the store holds already
    """
    chosen, dropped = dict(encodings), []

    def total() -> float:
        return fixed_bytes + sum(sizes[s][e] for s, e in chosen.items())

    while total() > budget:
        options = {s: narrower(specs[s], e) for s, e in chosen.items() if len(sizes[s]) > 1}
        savings = {s: sizes[s][chosen[s]] - sizes[s][e] for s, e in options.items() if e is not None}
        if savings:
            widest = max(savings, key=lambda s: sizes[s][chosen[s]])
            narrow = options[widest]
            assert narrow is not None
            chosen[widest] = narrow
            continue
        droppable = [s for prefix in _DROPPED for s in chosen if s.startswith(prefix) and len(sizes[s]) > 1]
        if not droppable:
            break
        dropped.append(droppable[0])
        del chosen[droppable[0]]
        for s in chosen:  # there is room again: begin anew with what is left
            chosen[s] = encodings[s]
    features = [f"--encoding {s}={e}" for s, e in chosen.items() if encoding_for(specs[s], CHOOSE) == CHOOSE]
    flags = " ".join([f"--signals {','.join(chosen)}", *features])
    return Proposal(chosen, round(total()), tuple(dropped), total() <= budget, flags)
