"""Model card of a run in Markdown: what it is, how it was made, how good it is, how to use and cite it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols

from molkd.pipeline.config import OPTIONS, OUTPUT_SIGNALS
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.seeds import SeedStat
from molkd.pipeline.evaluation.tables import Column, format_number, markdown_table
from molkd.pipeline.files import write_atomic
from molkd.pipeline.models.potential import Potential

METHOD = (
    "Knowledge distillation: Ekström Kelvinius, Georgiev, Toshev, Gasteiger, *Accelerating Molecular Graph "
    "Neural Networks via Knowledge Distillation*, NeurIPS 2023, arXiv:2306.14818."
)
_LIMITS = (
    "Made for the elements and kinds of structures it was trained on; elsewhere these errors say nothing.",
    "Measured on single structures: stable dynamics, stresses and relaxed structures were not tested.",
)
_DIRECT_FORCES = (
    "Forces come from a head of their own and are not the gradient of the energy: energy is not conserved in "
    "molecular dynamics without a thermostat."
)
_USAGE = """\
```python
import ase.io

from molkd.pipeline.data.ase_source import record_from_atoms
from molkd.pipeline.data.records import build_system
from molkd.pipeline.graphs.batch import batch_from_systems
from molkd.pipeline.models.potential import Potential

potential = Potential.load("{model}")
atoms = ase.io.read("structure.xyz")  # any ASE Atoms
system = build_system(record_from_atoms(atoms), (), (), "structure.xyz")
output = potential.predict(batch_from_systems([system], potential.neighbor_rule))
energy = output["energy"].item()  # eV
forces = output["forces"].detach().numpy()  # (N, 3) eV/A
```

On files: `kd evaluate {model} structures.extxyz --predictions predicted.extxyz`."""


def write_card(
    run: Path, results: Mapping[str, Any], over_seeds: Mapping[str, Mapping[str, SeedStat]]
) -> Path:
    """Write card.md into a run folder from its best.safetensors.

    Parameters
    ----------
    run : run folder
    results : content of metrics.json
    over_seeds : by data set and metric, of all runs that differ from this one in the seed only

    Raises
    ------
    ModelError
        If best.safetensors is missing or damaged.
    """
    potential = Potential.load(run)
    card = model_card(
        name=str(results.get("label") or run.name),
        metadata={**potential.metadata, "scale": potential.scale.to_dict()},
        results=results,
        over_seeds=over_seeds,
        weights_sha256=potential.weights_sha256,
        model_path=str(run / "best.safetensors"),
    )
    path = run / "card.md"
    write_atomic(path, card)
    return path


def model_card(
    *,
    name: str,
    metadata: Mapping[str, Any],
    results: Mapping[str, Any],
    over_seeds: Mapping[str, Mapping[str, SeedStat]] | None = None,
    data: Mapping[str, Any] | None = None,
    limits: Sequence[str] = (),
    weights_sha256: str = "",
    model_path: str = "best.safetensors",
) -> str:
    """Return the card; what is not known is left out or said to be unknown, never guessed.

    Parameters
    ----------
    name : of the model
    metadata : of the model file: ``model`` (architecture and settings), ``scale`` (energy references and
        normalisation) and ``provenance`` (training data, teacher, losses, seed)
    results : content of metrics.json: ``val``, ``test``, ``n_parameters``, ``seconds``, ``seed``...
    over_seeds : mean and spread by data set and metric
    data : ``licence``, ``citation`` and other facts of the training data, in words; added to ``data`` of
        the provenance
    limits : sentences beside the general ones
    weights_sha256 : of the model file
    model_path : of the model file, for the examples
    """
    model, scale = metadata.get("model", {}), metadata.get("scale", {})
    provenance = metadata.get("provenance", {})
    known_data: dict[str, Any] = {**(provenance.get("data") or {}), **(data or {})}
    teacher = provenance.get("teacher") or {}
    direct = [_DIRECT_FORCES] if model.get("direct_forces") else []
    sections = [
        f"# {name}",
        _list(
            {
                "architecture": model.get("name"),
                "preset": provenance.get("student"),
                "parameters": results.get("n_parameters"),
                "elements": _symbols(provenance.get("elements", ())),
                "settings": _inline({k: v for k, v in model.items() if k != "name"}),
                "weights": f"sha256 {weights_sha256}" if weights_sha256 else None,
                "code": provenance.get("code"),
            }
        ),
        "## Training data",
        _list(
            {
                "store": provenance.get("store"),
                "dataset fingerprint": provenance.get("dataset_fingerprint"),
                "training systems": provenance.get("n_training_systems"),
                "energy labels": provenance.get("n_training_energies"),
                "mixed in": "; ".join(map(_mixed_in, provenance.get("mix", ()))) or None,
                **known_data,
                "licence": known_data.get("licence") or "not recorded",
            }
        ),
        "## Teacher and strategy",
        _strategy(provenance, teacher),
        "## Units and energy reference",
        _units(scale),
        "## Accuracy",
        _accuracy(results, over_seeds or {}),
        "## Limits",
        "\n".join(f"- {sentence}" for sentence in (*_LIMITS, *direct, *limits)),
        "## Use",
        _USAGE.format(model=model_path),
        "## Cite",
        _citations(teacher, known_data, has_kd=bool(provenance.get("kd") or provenance.get("pseudo_labels"))),
    ]
    return "\n\n".join(sections) + "\n"


def _mixed_in(mix: Mapping[str, Any]) -> str:
    licence = (mix.get("data") or {}).get("licence") or "not recorded"
    return (
        f"{mix.get('store')} (licence {licence}): {_short(mix.get('share'))} of each batch, "
        f"weight ratio {_short(mix.get('weight_ratio'))}, {mix.get('n_training_systems')} systems, "
        f"{mix.get('n_training_energies')} energy labels, "
        f"dataset fingerprint {mix.get('dataset_fingerprint')}"
    )


def _strategy(provenance: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    terms = provenance.get("kd") or ()
    slope = provenance.get("gradient_weight")
    of_labels = f"the labelled forces also taught the energy its slope: weight {_short(slope)}"
    if not terms and not provenance.get("pseudo_labels"):
        return "None: trained on the labels alone (`--kd none`)" + (f"; {of_labels}." if slope else ".")
    lines = [f"- loss {_taps(term)}: {_weight(term)}" + "".join(_choices(term)) for term in terms]
    if provenance.get("pseudo_labels"):
        lines.append("- where a label was missing, the teacher's energy and forces stood in")
    lines += [f"- {of_labels}"] if slope else []
    about = _list(
        {
            "teacher": teacher.get("name"),
            "its architecture": teacher.get("architecture"),
            "its weights": f"sha256 {teacher['weights_sha256']}" if teacher.get("weights_sha256") else None,
            "its features": _inline({k: v for k, v in teacher.get("taps", {}).items() if "/" not in k}),
            "its energies": teacher.get("energy_reference"),
            "its precision": teacher.get("precision"),
            "its licence": teacher.get("licence") or "not recorded",
        }
    )
    return "\n".join([*lines, about])


def _taps(term: Mapping[str, Any]) -> str:
    """Return the name of a loss with its taps, without the choices that `_choices` tells."""
    return str(term.get("label", term["name"])).partition(",")[0]


def _weight(term: Mapping[str, Any]) -> str:
    """Return the weight, how it was found, and over which part of the run it falls to zero."""
    found = term.get("weight_by", "given")
    text = f"weight {_short(term.get('weight'))}" + (f" ({found})" if found != "given" else "")
    if term.get("fade"):
        begin, end = (_short(share) for share in term["fade"])
        text += f", fading from {begin} to {end} of the run"
    return text


def _choices(term: Mapping[str, Any]) -> list[str]:
    """Return the settings that mean something for a loss: those on outputs have neither head nor choice."""
    if term["name"] in OUTPUT_SIGNALS:
        return []
    keys = [key for key in OPTIONS if key in term and (key != "delta" or term.get("loss") == "huber")]
    return [f", {key} {term[key]}" for key in keys]


def _units(scale: Mapping[str, Any]) -> str:
    references = {
        chemical_symbols[int(z)]: f"{float(energy):.6f}" for z, energy in scale.get("references", {}).items()
    }
    return _list(
        {
            "units": "eV, Angstrom, eV/Angstrom",
            "energies": "totals, as in the training labels",
            "reference per element (eV)": _inline(references) or "none",
            "normalisation": (
                f"energy mean {round(scale.get('energy_mean', 0.0), 6) + 0.0:.6f} eV, "
                f"energy scale {scale.get('energy_std', 1.0):.6f} eV, "
                f"forces scale {scale.get('forces_std', 1.0):.6f} eV/Angstrom; undone on output"
            ),
        }
    )


def _accuracy(results: Mapping[str, Any], over_seeds: Mapping[str, Mapping[str, SeedStat]]) -> str:
    rows: list[dict[str, object]] = []
    measured = {"validation": results.get("val") or {}, **(results.get("test") or {})}
    for dataset, values in measured.items():
        if any(values.get(key) is not None for key in REPORTED):
            rows.append(
                {"data": dataset, "run": f"this one, seed {results.get('seed', 'unknown')}", **values}
            )
    for dataset, stats in over_seeds.items():
        n = max((stat.n for stat in stats.values()), default=0)
        if n > 1:
            rows.append({"data": dataset, "run": f"mean ± spread, {n} seeds"} | dict(stats))
    if not rows:
        return "Not measured."
    columns = [Column("data", "data"), Column("run", "run")]
    columns += [Column(m.key, m.title, decimals=m.decimals) for m in REPORTED.values()]
    facts = {"best step": results.get("best_step"), "training time": _seconds(results.get("seconds"))}
    note = (
        "Free atoms only; EFwT: energy within 0.02 eV and every force component within 0.03 eV/Å; spread: "
        "sample standard deviation. The best step was chosen on the validation set."
    )
    return "\n\n".join([markdown_table(rows, columns), note, _list(facts)])


def _citations(teacher: Mapping[str, Any], data: Mapping[str, Any], *, has_kd: bool) -> str:
    lines = [f"- {METHOD}"] if has_kd else []
    lines += [f"- Teacher: {teacher['citation']}"] if has_kd and teacher.get("citation") else []
    lines += [f"- Data: {data['citation']}"] if data.get("citation") else []
    return "\n".join(lines) or "- The training data and the architecture's authors."


def _list(facts: Mapping[str, object]) -> str:
    return "\n".join(
        f"- {key}: {_short(value)}" for key, value in facts.items() if value not in (None, "", {}, [])
    )


def _inline(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items() if value is not None)


def _symbols(numbers: Sequence[int]) -> str:
    return " ".join(chemical_symbols[int(z)] for z in numbers)


def _seconds(value: object) -> str | None:
    return f"{format_number(float(value))} s" if isinstance(value, int | float) else None


def _short(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
