"""`kd cache verify --deep`: what no checksum shows. Sum rules on cached signals, and the live teacher's word.

A sample of systems is drawn at random. With the teacher each of them is computed again, alone and in the
precision of the store; what may differ is the error of the encoding and what float rounding does to this
teacher, which a second run in float64 measures.
"""

from collections.abc import Callable, Iterable
from functools import cache as kept
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from molkd.cache_schema.encoding import ENCODINGS, is_fitted, rounding_error
from molkd.cache_schema.jsonfile import canonical
from molkd.cache_schema.reader import Cache, SignalEntry
from molkd.cache_schema.teachers import TEACHER_IDENTITY
from molkd.cache_schema.verify import Progress, verify
from molkd.pipeline.caching import provenance
from molkd.pipeline.deep_report import Compared, DeepReport, Deviation
from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import CacheError
from molkd.pipeline.graphs.batch import to_device
from molkd.pipeline.graphs.neighbors import canonical_order
from molkd.pipeline.scope import source_of
from molkd.pipeline.sum_rules import Arrays, Bound, sum_rules
from molkd.pipeline.teacher_pass import build_work
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher

V2V_IS_SUM = ("GemNetOC",)  # architectures whose v2v is a sum over edges; a live teacher decides for itself
_NOISE_FACTOR = 4  # a store may differ from a recomputation by several times what that differs from float64
_FLOOR = 2  # units of rounding of a signal's largest value, where a few systems show no noise


def deep_verify(
    store: str | Path,
    *,
    teacher: str | None = None,
    n_systems: int = 32,
    scale_file: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> DeepReport:
    """Check every byte of a store, sum rules on a sample of its systems, and these systems with the teacher.

    Parameters
    ----------
    teacher : what `load_teacher` takes; None leaves recomputing out
    n_systems : size of the sample, for each teacher of the store
    scale_file : scale factors, for a checkpoint of OCP that holds none
    seed : of the sample
    progress : called with bytes checked and bytes in all

    Raises
    ------
    CacheError
        If the folder is no store, or holds no signals of the given teacher; names the weights of both.
    TeacherError, ModelError
        If the teacher cannot be loaded.
    """
    report = DeepReport(verify(store, progress=progress))
    if not report.files.ok:
        report.notes.append("values were not looked at: repair the files first")
        return report
    with Cache.open(store) as cache:
        live = _live_teachers(cache, teacher, scale_file, device) if teacher is not None else {}
        for name in live or cache.teachers:
            chosen = _sample(cache, name, n_systems, seed)
            report.systems[name] = chosen
            if not chosen:
                report.notes.append(f"{name}: no shard has all of its signals; nothing to look at")
                continue
            values = _Values(cache, name, chosen, live.get(name), report)
            report.notes += values.other_settings()
            values.check()
    return report


def _live_teachers(
    cache: Cache, spec: str, scale_file: Path | None, device: str
) -> dict[str, Callable[[str], Teacher]]:
    """Return, for each name under which the store knows this teacher, how to load it in a precision.

    Raises
    ------
    CacheError
        If no teacher of the store has these weights.
    """
    chosen = choose_device(device)

    @kept
    def load(precision: str) -> Teacher:
        return load_teacher(spec, device=chosen, dtype=getattr(torch, precision), scale_file=scale_file)

    weights = load("float32").info.weights_sha256
    known = {name: str(t.provenance.get("weights_sha256")) for name, t in cache.teachers.items()}
    same = [name for name, sha256 in known.items() if sha256 == weights]
    if not same:
        stored = ", ".join(f"{name} has {sha256}" for name, sha256 in known.items()) or "none"
        raise CacheError(
            f"{cache.path}: none of its teachers has the weights of {spec} ({weights}); {stored}. "
            "Give the file that the store was made with"
        )
    return dict.fromkeys(same, load)


def _sample(cache: Cache, teacher: str, n_systems: int, seed: int) -> list[int]:
    """Draw systems of which all signals are written and none was given up."""
    there = np.full(cache.n_systems, bool(cache.teachers[teacher].signals))
    for entry in cache.teachers[teacher].signals.values():
        there &= ~np.isin(cache.systems.shard, entry.missing_shards)
    there[cache.bad_systems(teacher)] = False
    systems = np.flatnonzero(there)
    drawn = np.random.default_rng(seed).permutation(systems)[:n_systems]
    return [int(i) for i in np.sort(drawn)]


class _Values:
    """Checks the values of one teacher in sampled systems."""

    def __init__(
        self,
        cache: Cache,
        name: str,
        systems: list[int],
        load: Callable[[str], Teacher] | None,
        report: DeepReport,
    ) -> None:
        self.cache, self.name, self.systems, self.report = cache, name, systems, report
        self.entries: dict[str, SignalEntry] = cache.teachers[name].signals
        self.bounds = {signal: _bound(entry) for signal, entry in self.entries.items()}
        self.provenance = cache.teachers[name].provenance
        self.precision = str(self.provenance.get("precision", "float32"))
        if self.precision not in ("float32", "float64"):
            raise CacheError(
                f"{cache.path}: teacher {name} computed in {self.precision}, "
                "this version knows float32 and float64; update molkd"
            )
        self.eps = float(np.finfo(self.precision).eps)
        self.v2v_is_sum = self.provenance.get("architecture") in V2V_IS_SUM
        self.live = load(self.precision) if load else None
        self.exact = load("float64") if load and self.precision != "float64" else None
        self.checks: dict[str, Deviation] = {}

    def other_settings(self) -> list[str]:
        """Return in which settings the live teacher differs from the store; values show what they matter."""
        if self.live is None:
            return []
        given, known = provenance(self.live), self.provenance
        lines = []
        for key in TEACHER_IDENTITY:
            old, new = ({"": x} if not isinstance(x, dict) else x for x in (known.get(key), given.get(key)))
            for part in sorted(old.keys() | new.keys()):
                if canonical(old.get(part)) != canonical(new.get(part)):
                    name = f"{key}.{part}".rstrip(".")
                    lines.append(f"{self.name}: {name} is {new.get(part)}, in the store {old.get(part)}")
        return lines

    def check(self) -> None:
        """Add all that is found to the report."""
        read = [self._read(index) for index in self.systems]
        if self.live is not None:
            self._recompute(self.live, read)
        for index, arrays in zip(self.systems, read, strict=True):
            for compared in sum_rules(arrays, self.bounds, self.eps, v2v_is_sum=self.v2v_is_sum):
                self._add(compared, index)
        self.report.checks += self.checks.values()

    def _read(self, index: int) -> Arrays:
        return self.cache.read([index], ("positions", "cell"), self.name, tuple(self.entries))

    def _add(self, compared: Compared, index: int) -> None:
        signal = compared.what.split(" ")[0]
        if compared.what not in self.checks:
            entry = self.entries[signal]
            self.checks[compared.what] = Deviation(self.name, compared.what, entry.spec.unit, _rms(entry))
        self.checks[compared.what].add(compared, source_of(self.cache, index))

    def _recompute(self, live: Teacher, read: list[Arrays]) -> None:
        gone = sorted(self.entries.keys() - live.signals.keys())
        self.report.problems += [f"{self.name}/{s}: the live teacher does not give it" for s in gone]
        signals = [signal for signal in self.entries if signal in live.signals]
        found = [self._compute(live, index, signals) for index in self.systems]
        noise = self._noise(found, signals)
        if self.v2v_is_sum or {"edge", "v2v"} <= live.signals.keys():
            self.v2v_is_sum = self._is_sum(live)
        for index, stored, values in zip(self.systems, read, found, strict=True):
            if "edge" in signals:
                self._same_order(index, stored, values)
            for signal in signals:
                own, expected = stored[f"teacher/{signal}"], values[signal].astype(np.float64)
                if own.shape != expected.shape:
                    continue  # other edges, which is reported
                allowed = self.bounds[signal](expected) + noise[signal]
                compared = Compared(f"{signal} = recomputed", own.astype(np.float64), expected, allowed)
                self._add(compared, index)

    def _compute(self, teacher: Teacher, index: int, signals: Iterable[str]) -> Arrays:
        work = build_work(self.cache, np.array([index]), teacher.neighbor_rule, teacher.dtype)
        out = teacher.compute(to_device(work.batch, teacher.device), tuple(signals))
        return {name: values.cpu().numpy() for name, values in out.items()}

    def _noise(self, found: list[Arrays], signals: list[str]) -> dict[str, float]:
        """Return what float rounding makes of each signal: the largest difference from a run in float64."""
        largest = {s: max(float(np.abs(values[s]).max(initial=0)) for values in found) for s in signals}
        noise = {s: _FLOOR * self.eps * largest[s] for s in signals}
        if self.exact is None:
            return noise
        for index, values in zip(self.systems, found, strict=True):
            exact = self._compute(self.exact, index, signals)
            for s in signals:
                if exact[s].shape == values[s].shape:
                    difference = float(np.abs(exact[s] - values[s]).max(initial=0))
                    noise[s] = max(noise[s], _NOISE_FACTOR * difference)
        return noise

    def _is_sum(self, live: Teacher) -> bool:
        """Say whether v2v of the live teacher is the sum of its edge features along the edges."""
        if not {"edge", "v2v"} <= live.signals.keys():
            return False
        teacher = self.exact or live
        index = max(self.systems, key=lambda i: int(self.cache.system_n_atoms[i]))
        out = self._compute(teacher, index, ("edge", "v2v"))
        geometry = self.cache.read([index], ("positions", "cell"))
        arrays = geometry | {
            "teacher/edge": out["edge"],
            "teacher/v2v": out["v2v"],
            "teacher/edge/index": out["edge_index"],
            "teacher/edge/shift": out["edge_shift"],
        }
        eps = float(np.finfo(out["edge"].dtype).eps)
        exact = dict.fromkeys(("edge", "v2v"), partial(rounding_error, encoding=ENCODINGS["fp64"]))
        rules = sum_rules(arrays, exact, eps, v2v_is_sum=True)
        return all((np.abs(rule.found - rule.expected) <= rule.allowed).all() for rule in rules)

    def _same_order(self, index: int, stored: Arrays, values: Arrays) -> None:
        """Bring both lists of edges into one order; report where they are not the same edges."""
        lists = (
            (stored["teacher/edge/index"], stored["teacher/edge/shift"]),
            (values["edge_index"], values["edge_shift"]),
        )
        keys = [np.column_stack([ends.T, np.rint(shift).astype(np.int64)]) for ends, shift in lists]
        orders = [canonical_order(key[:, 1], key[:, 0], key[:, 2:]) for key in keys]
        ours, theirs = (key[order] for key, order in zip(keys, orders, strict=True))
        if not np.array_equal(ours, theirs):
            n_other = len({*map(tuple, ours.tolist())} ^ {*map(tuple, theirs.tolist())})
            self.report.problems.append(
                f"{self.name}/edge: {source_of(self.cache, index)}: {n_other} edges are only in the store "
                f"or only in the live teacher's graph ({len(ours)} and {len(theirs)} edges)"
            )
            values["edge"] = values["edge"][:0]
            return
        stored["teacher/edge"] = stored["teacher/edge"][orders[0]]
        stored["teacher/edge/index"] = stored["teacher/edge/index"][:, orders[0]]
        stored["teacher/edge/shift"] = stored["teacher/edge/shift"][orders[0]]
        values["edge"] = values["edge"][orders[1]]


def _bound(entry: SignalEntry) -> Bound:
    """Return how far a value of this size can be from what the teacher gave.

    Of a plain encoding that is its rounding; of a fitted one the largest error that any value of the store
    has, which the commit records hold, and the rounding of decoding it.
    """
    if not is_fitted(entry.encoding):
        return partial(rounding_error, encoding=ENCODINGS[entry.encoding])
    largest = entry.error_max_abs + 4 * float(np.finfo(np.float32).eps) * entry.max_abs
    return lambda values: np.full(values.shape, largest)


def _rms(entry: SignalEntry) -> float:
    rms: NDArray[np.float64] = entry.statistics.rms if entry.statistics else np.zeros(1)
    return float(np.sqrt((rms**2).mean()))
