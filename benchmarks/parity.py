"""Largest deviation from fairchem-core 1.10 per model and precision, on the reference data of the tests.

    python benchmarks/parity.py

Prints a Markdown table: float64 against the peer's float64 relative to the largest value, and float32 against
the peer's float64 beside what the peer's own float32 deviates (absolute, in eV and eV/A of random weights).
The OC20-sized GemNet-OC needs the published scale factors beside the checkout (../shared/reference).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "models"))

from ocp_reference import CASES, SHARED, batch_of, load_case, load_model, relative_error

KEYS = ("energy", "forces")


def main() -> None:
    print(
        "| model | case | atoms | energy, float64 | forces, float64 | "
        "energy, float32 (peer's) | forces, float32 (peer's) |"
    )
    print("| --- " * 7 + "|")
    for folder, name in CASES:
        if folder.startswith("gemnet_oc_oc20") and not SHARED.exists():
            print(f"| {folder} | skipped: no published scale factors at {SHARED} | | | | | |")
            continue
        case = load_case(folder, name)
        exact, single = (outputs(folder, case, dtype) for dtype in (torch.float64, torch.float32))
        reference, peers = case["out_f64"], case["out_f32"]
        cells = [f"{relative_error(exact[key].view_as(reference[key]), reference[key]):.0e}" for key in KEYS]
        for key in KEYS:
            ours, theirs = (
                float((value.double().view_as(reference[key]) - reference[key]).abs().max())
                for value in (single[key], peers[key])
            )
            cells.append(f"{ours:.1e} ({theirs:.1e})")
        n_atoms = "+".join(str(n) for n in case["inputs"]["natoms"].tolist())
        print(f"| {folder} | {name.removeprefix('case_')} | {n_atoms} | {' | '.join(cells)} |")


def outputs(folder: str, case: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Run our model of a case."""
    model = load_model(folder, case["model_config"]).to(dtype).eval()
    found = model(batch_of(case["inputs"], model.neighbor_rule, dtype))
    return {key: found[key].detach() for key in KEYS}


if __name__ == "__main__":
    main()
