"""What a study file says: store, teachers, pairs, strategies, settings, seeds; checked without the store."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from molkd.cache_schema.remote import is_url
from molkd.pipeline.config import Settings
from molkd.pipeline.models.registry import preset_names
from molkd.pipeline.places import Place, short_name
from molkd.pipeline.study.names import BUNDLED, nearest

_NAME = r"^[A-Za-z0-9](?:_?[A-Za-z0-9.+,=-])*$"  # of a folder; two underscores separate settings in it


def _as_text(given: Any) -> Any:
    """Take a number for a name, such as that of a weight."""
    return f"{given:g}" if isinstance(given, int | float) and not isinstance(given, bool) else given


# Settings of a run that a study gives itself: key -> where in the file.
_OWN = {
    **{key: key for key in ("store", "out", "test", "test_groups")},
    "student": "pairs",
    "teacher": "pairs",
    "seed": "seeds",
    **dict.fromkeys(("kd", "kd_auto", "label"), "strategies"),
}
FILTER_KEYS = ("pair", "teacher", "student", "strategy", "seed")

Name = Annotated[str, BeforeValidator(_as_text), Field(pattern=_NAME)]


def _as_list(given: Any) -> Any:
    """Take one for a list of one."""
    return (given,) if isinstance(given, str | int | float) else given


def _as_places(given: Any) -> Any:
    """Take a list of places for a mapping from their short names."""
    if not isinstance(given, list | tuple | str):
        return given
    places = [given] if isinstance(given, str) else given
    named = {short_name(str(place).removeprefix(BUNDLED)): place for place in places}
    if len(named) < len(places):
        raise ValueError("two files of the same name; give a mapping from names to places")
    return named


def _as_seeds(given: Any) -> Any:
    """Take a number for so many seeds from 0."""
    return tuple(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given


Texts = Annotated[tuple[Annotated[str, BeforeValidator(_as_text)], ...], BeforeValidator(_as_list)]
Places = Annotated[dict[Name, Place], BeforeValidator(_as_places)]
Assignments = dict[str, Any]  # any setting of `kd train-student`, dotted as for --set, or nested
Filter = dict[str, Texts]  # patterns by `FILTER_KEYS` and axes


class DataSpec(Settings):
    """How the store is made, as by `kd ingest`."""

    files: Annotated[tuple[Place, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    drop_labels: Annotated[tuple[Place, ...], BeforeValidator(_as_list)] = ()
    energy_key: str | None = None
    forces_key: str | None = None
    licence: str = ""
    citation: str = ""


class TeacherTraining(Settings):
    """How a teacher is trained first, on the labels of the store."""

    preset: str
    steps: int | None = Field(None, ge=1)  # None: the length that the preset says
    seed: int = Field(0, ge=0)
    set: Assignments = Field(default_factory=dict)


class TeacherSpec(Settings):
    """A teacher: a model at hand, or one to train; for stage one, and to be measured in the tables."""

    model: str | None = None  # as for `kd cache-teacher --teacher`
    train: TeacherTraining | None = None
    scale_file: Path | None = None
    signals: Texts = ()  # to cache beside those that the strategies learn from
    encoding: Texts = ()

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.train is None):
            raise ValueError("give either model (a file, run folder or name) or train (a preset)")
        return self


class Pair(Settings):
    """A teacher, by its name in the store, and a student."""

    teacher: Name
    student: str  # a preset
    name: Name = ""  # of the folder; left out: TEACHER-to-STUDENT
    # of terms that strategies give no weight, as in the paper's Table 7:
    lambdas: dict[str, float | Literal["auto", "balance"]] = Field(default_factory=dict)
    set: Assignments = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("name"):
            return given
        return {**given, "name": f"{given.get('teacher')}-to-{given.get('student')}"}


class Strategy(Settings):
    """What a student learns from its teacher: texts of `--kd`, and settings that go with them."""

    kd: Texts = ()
    set: Assignments = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _only_terms(cls, given: Any) -> Any:
        if given is None or isinstance(given, str | list | tuple):
            given = {"kd": given or ()}
        terms = given.get("kd") if isinstance(given, Mapping) else None
        return {**given, "kd": ()} if terms in ("none", ["none"], None) else given


class ReportSpec(Settings):
    """What the tables are made with."""

    test: Annotated[tuple[Place, ...], BeforeValidator(_as_list)] = ()  # more data to measure on
    device: str = "auto"
    throughput: bool = False  # measure the speeds of a pair's runs and teacher anew, in turns


class StudyConfig(Settings):
    """`kd study`: which runs to make from one store, and how."""

    name: Name
    out: Path  # left out: the name, beside the file
    store: Place
    data: DataSpec | None = None  # None: the store is there
    teachers: dict[Name, TeacherSpec] = Field(default_factory=dict)  # others have to be in the store
    pairs: tuple[Pair, ...] = Field(min_length=1)
    strategies: dict[Name, Strategy] = Field(min_length=1)
    settings: dict[Name, dict[Name, Assignments]] = Field(default_factory=dict)  # axes, which are crossed
    zip: tuple[tuple[str, ...], ...] = ()  # axes that go side by side, first with first, instead
    only: tuple[Filter, ...] = ()  # a run has to fit one of these
    skip: tuple[Filter, ...] = ()  # and none of these
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_seeds)] = Field(
        (0, 1, 2), min_length=1
    )
    steps: int | None = Field(None, ge=1)  # of every run, however many epochs these are
    set: Assignments = Field(default_factory=dict)  # of every run
    val: Place | None = None
    test: Places = Field(default_factory=dict)
    test_groups: dict[Name, Texts] = Field(default_factory=dict)  # of test sets, whose mean is told too
    report: ReportSpec = ReportSpec()

    @model_validator(mode="before")
    @classmethod
    def _default_out(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("name") and not given.get("out"):
            return {**given, "out": given["name"]}
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_twice("pairs", [pair.name for pair in self.pairs], "name them")
        _refuse_twice("seeds", list(self.seeds), "each seed is one run")
        for axis, alternatives in self.settings.items():
            if not alternatives:
                raise ValueError(f"settings.{axis}: no alternatives")
            if axis in FILTER_KEYS:
                raise ValueError(f"settings.{axis}: {axis} has another meaning in filters; rename the axis")
        for name in self.teachers:
            _known(f"teachers.{name}", name, [pair.teacher for pair in self.pairs], "teacher of a pair")
        for pair in self.pairs:
            _known(f"pairs: student {pair.student}", pair.student, preset_names(), "preset")
            terms = [without_weight(t) for s in self.strategies.values() for t in s.kd]
            for term in pair.lambdas:
                _known(f"pairs: {pair.name}: lambdas.{term}", term, terms, "loss of the strategies")
        _refuse_twice(
            "report.test",
            [*self.test, *(short_name(str(place).removeprefix(BUNDLED)) for place in self.report.test)],
            "each name in the tables is one file; rename one, or name it under `test`",
        )
        for where, given in self._assignments():
            _refuse_own(where, given, {**_OWN, **({"val": "val"} if self.val else {})})
        if self.data is not None and is_url(self.store):
            raise ValueError("store: one on a server is only read; give a folder, or leave `data` out")
        self._check_zip()
        return self

    @property
    def label_keys(self) -> dict[str, str]:
        """How labels are called in all files of the study, where they have no usual name."""
        keys = ("energy_key", "forces_key")
        of_data = {key: getattr(self.data, key, None) for key in keys}
        found = {key: self.set.get(key, of_data[key]) for key in keys}
        return {key: name for key, name in found.items() if name is not None}

    def _assignments(self) -> Iterator[tuple[str, Assignments]]:
        """Yield all settings of runs, with where they stand in the file."""
        yield "set", self.set
        yield from ((f"pairs: {pair.name}: set", pair.set) for pair in self.pairs)
        yield from ((f"strategies.{name}.set", s.set) for name, s in self.strategies.items())
        for axis, alternatives in self.settings.items():
            yield from ((f"settings.{axis}.{name}", given) for name, given in alternatives.items())

    def _check_zip(self) -> None:
        together = [axis for group in self.zip for axis in group]
        _refuse_twice("zip", together, "an axis goes with one group")
        for axis in together:
            _known(f"zip: {axis}", axis, list(self.settings), "axis of settings")
        for group in self.zip:
            lengths = {len(self.settings[axis]) for axis in group}
            if len(lengths) > 1:
                raise ValueError(f"zip: {', '.join(group)} have different numbers of alternatives")


def without_weight(term: str) -> str:
    """Return a text of --kd without its weight: n2n,head=mlp for n2n=10,head=mlp."""
    what, comma, options = term.partition(",")
    return what.partition("=")[0] + comma + options


def with_weight(term: str, lambdas: Mapping[str, float | str]) -> str:
    """Return a text of --kd with the weight that its pair has for it, unless it has one."""
    what, comma, options = term.partition(",")
    if "=" in what or term not in lambdas:
        return term
    return f"{what}={lambdas[term]}{comma}{options}"


def _known(where: str, name: str, valid: Collection[str], kind: str) -> None:
    if name not in valid:
        raise ValueError(f"{where}: no {kind} is called so; {nearest(name, valid)}")


def _refuse_own(where: str, given: Assignments, own: Mapping[str, str]) -> None:
    """Refuse settings that the study gives to each run itself, and would override."""
    for key in given:
        if (what := key.partition(".")[0]) in own:
            raise ValueError(f"{where}: {key} would not count; the study says it under `{own[what]}`")


def _refuse_twice(where: str, names: Sequence[Any], remedy: str) -> None:
    twice = {str(name) for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{where}: {', '.join(sorted(twice))} stands there twice; {remedy}")
