"""Forward pass beside fairchem-core 1.10, the same weights and systems in one interleaved run.

Runs in an environment that holds both (../shared/peer/README.md says how to make it; add
`pip install --no-deps` of this project and what it lacks)::

    python benchmarks/peer.py [--models gemnet_oc_oc20 gemnet_oc_coll ...] [--cases slab mols pt-co]
                              [--repeats 9] [--memory] [--json out.json]

Both sides start from positions on the host: neighbour lists and index sets are part of the time. Energies
and forces are computed without parameter gradients, in float32, on one thread. `--memory` measures, in a
process of its own for each side, by how much one forward pass raises the peak of the resident memory.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from ase.io import read

from molkd.pipeline.graphs.batch import make_batch
from molkd.pipeline.models.registry import build_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
sys.path.insert(0, str(SHARED / "peer"))
N_PT_CO = 4  # frames in one batch


class Peer:
    """fairchem's model."""

    def __init__(self, name):
        import peer_common

        self.tools = peer_common
        self.model = peer_common.build(peer_common.PAPER[name], 0)

    def prepare(self, arrays, use_pbc, qint_tags):
        """Return what `forward` takes."""
        tags = qint_tags if hasattr(self.model, "qint_tags") else None
        self.tools.apply_overrides(self.model, use_pbc=use_pbc, qint_tags=tags)
        return self.tools.make_batch(arrays)

    def forward(self, batch):
        """Return energy and forces."""
        out = self.model(batch)
        return out["energy"].view(-1), out["forces"].view(-1, 3)


class Ours:
    """Our model with the peer's weights."""

    def __init__(self, name):
        import peer_common

        self.config = {k: v for k, v in peer_common.PAPER[name].items() if k != "otf_graph"}
        self.model = build_model(self.config)

    def prepare(self, arrays, use_pbc, qint_tags):
        """Return what `forward` takes."""
        config = self.config | {"use_pbc": use_pbc}
        if "qint_tags" in config:
            config["qint_tags"] = qint_tags
        weights = self.model.state_dict()
        self.model = build_model(config).eval()
        self.model.load_state_dict(weights)
        return arrays

    def forward(self, arrays):
        """Return energy and forces."""
        batch = make_batch(
            atomic_numbers=arrays["Z"],
            positions=arrays["pos"],
            n_atoms=arrays["natoms"],
            cell=arrays["cell"],
            pbc=arrays["pbc"],
            tags=arrays["tags"],
            fixed=arrays["fixed"].astype(bool),
            rule=self.model.neighbor_rule,
        )
        out = self.model(batch)
        return out["energy"], out["forces"]


SIDES = {"fairchem": Peer, "molkd": Ours}


def cases(names):
    """Name -> arrays, use_pbc, qint_tags."""
    import peer_systems

    made = {}
    if "slab" in names:
        made["slab"] = (peer_systems.batch_arrays([peer_systems.bench_slab()]), True, [1, 2])
    if "mols" in names:
        made["mols"] = (peer_systems.batch_arrays(peer_systems.bench_molecules()), False, [0, 1, 2])
    path = SHARED / "data" / "pt-co" / "test.extxyz"
    if "pt-co" in names and path.exists():
        frames = read(path, f":{N_PT_CO}")
        for i, frame in enumerate(frames):
            frame.rattle(0.02, seed=i)  # else rounding decides on equally far neighbors, in the peer
        systems = [
            peer_systems.to_system(frame, tags=np.ones(len(frame), dtype=np.int64)) for frame in frames
        ]
        made["pt-co"] = (peer_systems.batch_arrays(systems), True, [0, 1, 2])
    return made


def sides(name, chosen=tuple(SIDES)):
    """Both models with the same weights, scale factors fitted."""
    from weight_recipe import apply_recipe

    built = {side: SIDES[side](name) for side in chosen}
    for side in built.values():
        apply_recipe(side.model, 1)
    return built


def once(side, prepared):
    begin = time.perf_counter()
    no_grad = (
        torch.no_grad if side.model.__class__.__name__.startswith(("GemNet", "PaiNN")) else torch.enable_grad
    )
    with no_grad():
        energy, forces = side.forward(prepared)
    return time.perf_counter() - begin, energy.detach(), forces.detach()


def measure(name, case, repeats):
    arrays, use_pbc, tags = cases([case])[case]
    both = sides(name)
    prepared = {k: side.prepare(arrays, use_pbc, tags) for k, side in both.items()}
    for side in both.values():
        side.model.requires_grad_(False)
    results = {k: once(side, prepared[k]) for k, side in both.items()}  # warm-up, and do they agree?
    (_, e1, f1), (_, e2, f2) = results.values()
    seconds = {k: [] for k in both}
    for _ in range(repeats):
        for k, side in both.items():
            seconds[k].append(once(side, prepared[k])[0])
    ratios = [a / b for a, b in zip(seconds["fairchem"], seconds["molkd"], strict=True)]
    return {
        "model": name,
        "case": case,
        "n_atoms": len(arrays["Z"]),
        "fairchem_s": statistics.median(seconds["fairchem"]),
        "molkd_s": statistics.median(seconds["molkd"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "energy_difference": float((e1 - e2).abs().max()),
        "forces_difference": float((f1 - f2).abs().max()),
    }


def peak(name, case, side_name):
    """MB by which the first forward pass raises the resident memory of this process (Linux)."""
    arrays, use_pbc, tags = cases([case])[case]
    side = sides(name, (side_name,))[side_name]
    prepared = side.prepare(arrays, use_pbc, tags)
    side.model.requires_grad_(False)
    torch.nn.functional.linear(torch.ones(512, 512), torch.ones(512, 512))  # what libraries set up once
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # building the model left freed memory behind
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    once(side, prepared)
    return (memory("VmHWM") - before) / 1024


def memory(entry):
    """Kilobytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["gemnet_oc_oc20", "gemnet_oc_coll"])
    parser.add_argument("--cases", nargs="+", default=["slab", "mols", "pt-co"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        print(peak(args.models[0], args.cases[0], args.peak_of))
        return
    rows = []
    for name in args.models:
        for case in args.cases:
            row = measure(name, case, args.repeats)
            if args.memory:
                for side in SIDES:
                    command = [sys.executable, __file__, "--models", name, "--cases", case, "--peak-of", side]
                    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    row[f"{side}_peak_mb"] = float(output.split()[-1])
            rows.append(row)
            print(
                json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
