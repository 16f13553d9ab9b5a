"""What makes a report reproducible: commands, versions, fingerprints, conditions of speed, citations."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from molkd.pipeline.config import TrainConfig, make_config
from molkd.pipeline.environment import environment
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.card import METHOD
from molkd.pipeline.evaluation.groups import Group
from molkd.pipeline.evaluation.reproduce import train_command
from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.results import Evaluations, TeacherResult
from molkd.pipeline.evaluation.runs import Run
from molkd.pipeline.evaluation.throughput import Throughput

_SAME = ("device", "n_threads", "batch_size", "dtype")  # without which throughputs do not compare


@dataclass(frozen=True)
class Origin:
    """Rows of tables hold what is to be shown, by title."""

    commands: Mapping[str, tuple[str, ...]]  # by name of the group, one a run
    report_command: str | None
    environments: tuple[dict[str, str], ...]  # what made what, and its versions
    conditions: tuple[dict[str, str], ...]  # of throughputs
    fingerprints: tuple[dict[str, str], ...]  # kind, name, sha256
    citations: tuple[str, ...]


def origin_of(
    groups: Sequence[Group], teacher: TeacherResult | None, evaluations: Evaluations, command: str | None
) -> Origin:
    """Collect what the runs and evaluations have kept."""
    here = environment()
    return Origin(
        commands={group.name: tuple(_command(run) for run in group.runs) for group in groups},
        report_command=command,
        environments=(*_environments(groups), {"what": "this report", **here}),
        conditions=_conditions(_measured(groups, teacher, evaluations)),
        fingerprints=_unique(_fingerprints(groups, teacher, evaluations)),
        citations=_citations(groups, here["molkd"]),
    )


def incomparable_speeds(
    groups: Sequence[Group], teacher: TeacherResult | None, evaluations: Evaluations
) -> list[str]:
    """Say on which data throughputs were measured under conditions that do not compare."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for (_, dataset), evaluation in _measured(groups, teacher, evaluations):
        if evaluation.throughput is not None:
            plain = asdict(evaluation.throughput.conditions)
            found.setdefault(dataset, set()).add(tuple(str(plain[key]) for key in _SAME))
    return [
        f"systems per second on {dataset} do not compare: measured under {len(kinds)} different conditions, "
        "see Conditions of throughput; --throughput measures all anew, in turns"
        for dataset, kinds in found.items()
        if len(kinds) > 1
    ]


def _measured(
    groups: Sequence[Group], teacher: TeacherResult | None, evaluations: Evaluations
) -> Iterator[tuple[tuple[str, str], Evaluation]]:
    """Yield model and data set with what was measured; of a group every run."""
    for dataset, evaluation in (teacher.evaluations if teacher else {}).items():
        yield (f"teacher: {teacher.name if teacher else ''}", dataset), evaluation
    for group in groups:
        for run in group.runs:
            for dataset, evaluation in evaluations.get(run.path, {}).items():
                yield (group.name, dataset), evaluation


def _conditions(measured: Iterable[tuple[tuple[str, str], Evaluation]]) -> tuple[dict[str, str], ...]:
    """Return a row for what was measured in the same way, seeds together."""
    alike: dict[tuple[tuple[str, str], ...], list[Throughput]] = {}
    for (model, dataset), evaluation in measured:
        if evaluation.throughput is not None:
            found = evaluation.throughput.conditions
            row = {
                "model": model,
                "data": dataset,
                "device": found.device,
                "threads": "–" if found.n_threads is None else str(found.n_threads),
                "systems a batch": str(found.batch_size),
                "atoms a system": f"{found.atoms_per_system:.1f}",
                "precision": found.dtype,
            }
            alike.setdefault(tuple(row.items()), []).append(evaluation.throughput)
    return tuple({**dict(row), **_repeats(its)} for row, its in alike.items())


def _repeats(measured: Sequence[Throughput]) -> dict[str, str]:
    low, high = min(one.lower_quartile for one in measured), max(one.upper_quartile for one in measured)
    return {
        "repeats": str(sum(one.n_repeats for one in measured)),
        "middle half of repeats (systems/s)": f"{low:.3g} to {high:.3g}",
    }


def _fingerprints(
    groups: Sequence[Group], teacher: TeacherResult | None, evaluations: Evaluations
) -> Iterator[dict[str, str]]:
    for run in (run for group in groups for run in group.runs):
        data, learnt_from = run.summary.get("dataset_fingerprint"), run.summary.get("teacher")
        if isinstance(data, str):
            yield {"what": "training data", "name": str(run.config.get("store")), "sha256": data}
        if weights := _text(learnt_from, "weights_sha256"):
            yield {"what": "cached teacher", "name": _text(learnt_from, "name") or "", "sha256": weights}
    for (model, dataset), evaluation in _measured(groups, teacher, evaluations):
        if teacher is not None and model == f"teacher: {teacher.name}" and evaluation.weights_sha256:
            yield {"what": "measured teacher", "name": teacher.name, "sha256": evaluation.weights_sha256}
        if evaluation.data_fingerprint:
            yield {"what": "test data", "name": dataset, "sha256": evaluation.data_fingerprint}


def _citations(groups: Sequence[Group], version: str) -> tuple[str, ...]:
    """Return what a paper that uses these runs should cite: method, teachers, data, software."""
    found = [METHOD.replace("*", "")] if any(group.has_kd for group in groups) else []
    for key, word in (("teacher", "Teacher"), ("data", "Data")):
        texts = (_text(run.summary.get(key), "citation") for group in groups for run in group.runs)
        found += dict.fromkeys(f"{word}: {text}" for text in texts if text)
    return (*found, f"Software: molkd {version}, see CITATION.cff.")


def _environments(groups: Sequence[Group]) -> Iterator[dict[str, str]]:
    """Return every set of versions once, with the groups that have runs made with it."""
    names: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for group in groups:
        for facts in filter(None, map(_recorded, group.runs)):
            names.setdefault(tuple(facts.items()), []).append(group.name)
    for versions, its in names.items():
        unique = list(dict.fromkeys(its))
        yield {"what": "runs" if len(unique) == len(groups) else "; ".join(unique), **dict(versions)}


def _recorded(run: Run) -> dict[str, str] | None:
    """Return the versions that a run was made with, if it kept them."""
    found = run.summary.get("environment")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else None


def _command(run: Run) -> str:
    try:
        return train_command(make_config(TrainConfig, run.config), run.path)
    except ConfigError as error:
        return f"# {run.path / 'config.yaml'}: not settings of this version ({error})".replace("\n", " ")


def _unique(rows: Iterable[dict[str, str]]) -> tuple[dict[str, str], ...]:
    return tuple({tuple(row.items()): row for row in rows}.values())


def _text(mapping: Any, key: str) -> str | None:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    return value if isinstance(value, str) and value else None
