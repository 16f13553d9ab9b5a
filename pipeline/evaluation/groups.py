"""Sort runs into groups that differ in the seed only, and find the group without KD to compare with."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.runs import NO_KD, Run

WITHOUT = "without KD"


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one student and KD setting that differ in the seed only."""

    name: str
    student: str
    kd: str
    runs: tuple[Run, ...]
    differences: tuple[str, ...] = ()  # in settings and length, beyond KD, from its baseline

    @property
    def has_kd(self) -> bool:
        """Whether a teacher took part."""
        return self.kd != NO_KD


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Put runs that differ in the seed only together; within a student the group without KD comes first.

    Names are "student, kd"; where two groups would be called the same, the settings that differ follow.

    Raises
    ------
    DataError
        If a group holds a seed twice: the spread would be too small.
    """
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        found.setdefault(group_key(run), []).append(run)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != NO_KD, item[0][1]))
    groups = []
    for (student, kd, _), members in ordered:
        members.sort(key=lambda run: run.seed)
        for first, second in itertools.pairwise(members):
            if first.seed == second.seed:
                raise DataError(
                    f"{first.path} and {second.path} are the same run (seed {first.seed}); leave one out"
                )
        namesakes = [
            r[0].settings for (s, k, _), r in ordered if (s, k) == (student, kd) and r is not members
        ]
        name = ", ".join(
            [student, WITHOUT if kd == NO_KD else kd, *_distinction(members[0].settings, namesakes)]
        )
        groups.append(Group(name, student, kd, tuple(members)))
    return [_with_differences(group, groups) for group in groups]


def group_key(run: Run) -> tuple[str, str, str]:
    """Return what runs of one group share: student, KD and the other settings."""
    return run.student, run.kd, json.dumps(run.settings, sort_keys=True, default=str)


def comparisons(groups: Sequence[Group]) -> list[tuple[Group | None, list[Group]]]:
    """Return each group without KD beside the groups with KD compared with it; None if there is none."""
    found: list[tuple[Group | None, list[Group]]] = [(g, []) for g in groups if not g.has_kd]
    for group in groups:
        if not group.has_kd:
            continue
        baseline = baseline_of(group, groups)
        entry = next(
            (e for e in found if e[0] is baseline and (baseline or e[1][0].student == group.student)), None
        )
        if entry is None:
            found.append((None, [group]))
        else:
            entry[1].append(group)
    return found


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """Return the group of the same student without KD that differs least in its other settings."""
    candidates = [g for g in groups if g.student == group.student and not g.has_kd]
    return min(candidates, key=lambda g: len(_differing(group, g)), default=None)


def _with_differences(group: Group, groups: Sequence[Group]) -> Group:
    baseline = baseline_of(group, groups) if group.has_kd else None
    if baseline is None:
        return group
    ours, theirs = group.runs[0].settings, baseline.runs[0].settings
    remarks = [f"{k}: {ours.get(k)}, without KD {theirs.get(k)}" for k in _differing(group, baseline)]
    its_steps, steps = (_steps(one) for one in (group, baseline))
    if (
        its_steps and steps and its_steps != steps
    ):  # equal epochs of more systems, or of smaller parts of batches
        remarks.append(f"optimiser steps: {its_steps}, without KD {steps}")
    return replace(group, differences=tuple(remarks))


def _steps(group: Group) -> str:
    """Return how many steps its runs took, "" where they do not say."""
    found = {run.summary.get("steps") for run in group.runs}
    return " and ".join(f"{n:,}" for n in sorted(n for n in found if isinstance(n, int)))


def _differing(first: Group, second: Group) -> list[str]:
    a, b = first.runs[0].settings, second.runs[0].settings
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _distinction(settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = {
        key
        for other in others
        for key in settings.keys() | other.keys()
        if settings.get(key) != other.get(key)
    }
    return [f"{key}={settings.get(key)}" for key in sorted(keys)]
