"""A forecast in words and tables."""

from typing import TYPE_CHECKING

from molkd.pipeline.budget import Proposal

if TYPE_CHECKING:
    from molkd.pipeline.forecast import Forecast


def describe(price: "Forecast") -> str:
    """Return the price of stage one: a table of signals, then disk, speeds and time."""
    lines = [
        (
            f"{price.store}: {price.teacher} over {price.n_systems:,} systems, {price.n_atoms:,} atoms "
            f"({price.n_atoms / price.n_systems:.1f} a system)"
        )
    ]
    if price.stored_bytes:
        lines.append(f"takes {_size(price.stored_bytes)}; {price.n_systems_to_do:,} systems lack signals")
    lines += ["", f"{'':<24} {'encoding':<10} {'bytes/atom':>10} {'to write':>10}   others, bytes/atom"]
    for name, size in price.bytes_per_atom.items():
        others = ", ".join(f"{e} {b:.0f}" for e, b in price.alternatives.get(name, {}).items())
        row = f"{name:<24} {price.encodings.get(name, ''):<10} {size:>10.1f}"
        lines.append(f"{row} {_size(price.bytes_to_write[name]):>10}   {others}".rstrip())
    speed = price.write_bytes_per_second
    disk = f"the disk takes {speed / 1e6:.3g} MB/s" if speed else "the disk's speed is unknown"
    lines += [
        f"{'fill, metadata':<46} {_size(price.overhead_bytes):>10}",
        f"{'total':<46} {_size(price.total_bytes):>10}",
        "",
        f"disk      {_size(price.free_bytes)} free: {'fits' if price.fits else 'DOES NOT FIT'}",
        f"teacher   {price.teacher_systems_per_second:.3g} systems/s",
        f"graphs    {price.graph_systems_per_second:.3g} systems/s, beside the teacher",
        f"writing   {price.total_bytes / max(price.seconds, 1e-9) / 1e6:.3g} MB/s needed, {disk}",
        f"time      {_time(price.seconds)} on one device; n devices take a n-th",
    ]
    if price.proposal is not None:
        lines += ["", *_proposal_lines(price.proposal)]
    return "\n".join(lines)


def _proposal_lines(proposal: Proposal) -> list[str]:
    size = _size(proposal.total_bytes)
    if not proposal.fits:
        return [
            (
                f"Not even the least there is fits the budget: the store would take {size}; "
                "ask for fewer signals, or take fewer systems"
            )
        ]
    left_out = f", without {', '.join(proposal.dropped)}" if proposal.dropped else ""
    errors = ", ".join(f"{s} {_percent(error)}" for s, error in proposal.errors.items())
    return [
        f"Within the budget, the store takes {size}{left_out}:",
        f"  {proposal.flags}",
        *([f"relative rms errors, on half of the probe: {errors}"] if errors else []),
    ]


def _percent(error: float | None) -> str:
    return "cannot hold its values" if error is None else f"{100 * error:.2g} %"


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2g} h"
