"""Signals narrowed on the device that computed them, so that only what is stored crosses to the host."""

from collections.abc import Mapping
from dataclasses import fields
from math import prod

import torch
from torch import Tensor

from molkd.cache_schema.layout import SCALE
from molkd.cache_schema.narrowing import narrow
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.statistics import Moments
from molkd.pipeline.teacher_pass import Work

BROKEN = "broken"  # (S,) bool beside the signals: systems with a number that is not finite
_SUMS = "sums:"


def narrow_on_device(
    out: Mapping[str, Tensor], signals: Mapping[str, Signal], work: Work
) -> dict[str, Tensor]:
    """Return what a shard's writers take, as tensors on the device, without waiting for it.

    Parameters
    ----------
    out : what the teacher gave for `work`: values by signal; with edges ``edge_index`` and ``edge_shift`` too
    signals : those to store, as the store declares them

    Returns
    -------
    dict
        stored values under the signal's name, ``NAME/scale``, sums that `sums_of` reads, `BROKEN`,
        and the edges as they were
    """
    first = next(iter(signals))
    device = out[first].device
    n_atoms = torch.from_numpy(work.n_atoms).to(device, non_blocking=True)
    index = torch.from_numpy(work.indices).to(device, non_blocking=True)  # stored indices (S,)
    of_atoms = torch.repeat_interleave(
        torch.arange(len(work.indices), device=device), n_atoms, output_size=int(work.n_atoms.sum())
    )
    owner = {"system": torch.arange(len(work.indices), device=device), "atom": of_atoms}
    if "edge_index" in out:
        owner["edge"] = of_atoms[out["edge_index"][1]]
    n_broken = torch.zeros(len(work.indices), dtype=torch.int32, device=device)  # rows of each system
    for name, signal in signals.items():
        rows = out[name].reshape(len(out[name]), prod(signal.spec.shape))  # a batch may have no edges
        broken = ~rows.isfinite().all(dim=1)
        n_broken.index_add_(0, owner[signal.spec.axis], broken.int())
    sound = n_broken == 0
    tensors = {BROKEN: ~sound} | {k: out[k] for k in ("edge_index", "edge_shift") if k in out}
    for name, signal in signals.items():
        rows = owner[signal.spec.axis]
        book = signal.codebook
        held_out = None if book is None else index[rows] >= book.n_systems
        values = out[name].to(getattr(torch, signal.spec.dtype))
        stored, sums = narrow(signal, values, sound[rows], held_out)
        tensors[name] = stored["values"]
        if SCALE in stored:
            tensors[f"{name}/{SCALE}"] = stored[SCALE]
        for one in fields(Moments):
            value = getattr(sums, one.name)
            if not isinstance(value, Tensor):  # nothing was measured; made on the device, nothing waits
                value = torch.full((), value, device=device)
            tensors[f"{_SUMS}{name}:{one.name}"] = value.to(torch.float64)
    return tensors


def sums_of(name: str, arrays: Mapping[str, object]) -> Moments:
    """Return the sums of a signal among the arrays of `narrow_on_device`, once they are on the host."""
    found = {one.name: arrays[f"{_SUMS}{name}:{one.name}"] for one in fields(Moments)}
    for one in ("count", "held_out_count"):
        found[one] = int(found[one])  # type: ignore[call-overload]  # whole numbers below 2^53
    return Moments(**found)  # type: ignore[arg-type]
