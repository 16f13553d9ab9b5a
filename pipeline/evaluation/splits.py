"""Named groups of test sets, such as the four splits of OC20, and the mean over their splits.

The paper's Tables 2 and 3 give the mean of the four splits, each counting the same however many systems it
has; its Tables 8 to 11 give the splits one by one.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, harmonic_mean

from molkd.pipeline.config import SplitGroup
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.metrics import REPORTED

log = logging.getLogger(__name__)

Report = Mapping[str, float | None]  # the keys of `Metrics.to_report`, and systems_per_second
OC20 = ("id", "ood_ads", "ood_cat", "ood_both")
_OC20_PREFIXES = ("val", "test")
_RATES = ("systems_per_second", "end_to_end_per_second")


def split_groups(given: Mapping[str, Sequence[str]], names: Iterable[str]) -> list[SplitGroup]:
    """Return the groups that were given, and OC20's four splits where all of them are among the test sets.

    Parameters
    ----------
    given : names of test sets by the name of the group
    names : of all test sets. val_id, val_ood_ads, val_ood_cat and val_ood_both, or test_..., are taken for
        OC20's, and the log says so

    Raises
    ------
    ConfigError
        If a group names a test set that does not exist, names one twice, or is called like one.
    """
    known = list(dict.fromkeys(names))
    groups = [SplitGroup(name, tuple(splits)) for name, splits in given.items()]
    problems = [problem for group in groups if (problem := group.problem(known))]
    if problems:
        raise ConfigError("; ".join(problems))
    for prefix in _OC20_PREFIXES:
        splits = tuple(f"{prefix}_{part}" for part in OC20)
        found = SplitGroup(f"oc20-{prefix}", splits)
        is_given = any(set(g.splits) == set(splits) for g in groups)
        is_free = found.name not in (*known, *(g.name for g in groups))
        if set(splits) <= set(known) and is_free and not is_given:
            log.info("%s: OC20's four splits, their mean is %s", ", ".join(splits), found.name)
            groups.append(found)
    return groups


def mean_report(
    group: SplitGroup, reports: Mapping[str, Report]
) -> tuple[dict[str, float | None], list[str]]:
    """Return the mean over the splits, each weighing the same, and what keeps a metric from having one.

    A metric that is missing for one of the splits has no mean: one over the others would be another quantity.
    The throughput is the harmonic mean, that of as many systems from each split.

    Parameters
    ----------
    reports : by split, with the keys of `Metrics.to_report` and systems_per_second
    """
    absent = [split for split in group.splits if not reports.get(split)]
    problems = [f"no mean over {group.name}: {split} was not measured" for split in absent]
    means: dict[str, float | None] = {}
    rates = [key for key in _RATES if any(key in report for report in reports.values())]
    for key in (*REPORTED, *rates):
        values = {split: reports.get(split, {}).get(key) for split in group.splits}
        present = [v for v in values.values() if v is not None]
        means[key] = None
        if len(present) == len(group.splits):
            means[key] = harmonic_mean(present) if key in _RATES else fmean(present)
        elif present and not absent:
            lacking = ", ".join(split for split, value in values.items() if value is None)
            problems.append(f"no mean of {key} over {group.name}: {lacking} has none")
    return means, problems
