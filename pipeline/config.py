"""Typed settings of both stages. Defaults live here; later wins: defaults < preset < YAML < --set < flags."""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from molkd.pipeline.errors import ConfigError
from molkd.pipeline.places import Place


class Settings(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class IngestConfig(Settings):
    """`kd ingest`: structures and labels into a store."""

    data: tuple[Place, ...] = ()
    store: Path
    drop_labels: tuple[
        Place, ...
    ] = ()  # more structures, whose labels are not kept: only a teacher labels them
    energy_key: str | None = None  # name of the energy in the files; None tries the usual ones
    forces_key: str | None = None
    require_labels: bool = False  # refuse systems without an energy
    on_conflict: Literal["error", "first"] = "error"  # same structure, different labels
    seed: int = Field(0, ge=0)  # of the order on disk
    shard_atoms: int | None = Field(None, ge=1024)  # atom rows a shard; None picks 65,536 or less
    licence: str = ""  # of the data, kept in the store
    citation: str = ""


_BATCH = {"cpu": (1024, 60_000), "cuda": (16_384, 1_000_000)}  # atoms, edges


class CacheConfig(Settings):
    """`kd cache-teacher`: one pass of the teacher over a store."""

    store: Path
    teacher: str
    scale_file: Path | None = None  # scale factors, for an OCP checkpoint that holds none
    signals: tuple[str, ...] = Field(("energy", "forces", "atomic_energies", "node"), min_length=1)
    name: str | None = None  # of the teacher's group in the store; None takes the teacher's own
    # Of features: one for all, or SIGNAL=ENCODING; else fp16. Energies and forces are never narrowed.
    encoding: tuple[str, ...] = ()
    max_error: float | None = Field(None, gt=0)  # relative rms; picks the smallest encoding within it
    batch_atoms: int = Field(0, ge=0)  # 0: chosen by device
    batch_edges: int = Field(0, ge=0)
    device: str = "auto"
    precision: Literal["float32", "float64"] = "float32"
    skip_bad: bool = False  # quarantine systems with non-finite output instead of stopping
    # Who does the shards, if not this process alone:
    workers: int | None = Field(None, ge=1)  # processes on this machine, with a teacher and device each
    scheduler: str | None = None  # the workers of a Dask scheduler: its address, or its scheduler file
    worker: tuple[int, int] | None = None  # (i, n) or "i/n": n processes, each every n-th shard, this from i

    @field_validator("worker", mode="before")
    @classmethod
    def _part(cls, given: Any) -> Any:
        """Read "i/n"."""
        if given is None:
            return None
        parts = given.split("/") if isinstance(given, str) else given
        if isinstance(parts, list | tuple) and len(parts) == 2 and all(str(p).isdecimal() for p in parts):
            index, of = (int(part) for part in parts)
            if index < of:
                return index, of
        raise ValueError("write it as i/n with i from 0 to n - 1, for example 0/4, 1/4, 2/4 and 3/4")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [f"--{key}" for key in ("workers", "scheduler", "worker") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} exclude each other; take --workers N on one machine, --scheduler for "
                "a Dask cluster, --worker i/n in each job of an array"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_encoding(cls, given: Any) -> Any:
        """Take a single encoding as a list of one."""
        if isinstance(given, Mapping) and isinstance(given.get("encoding"), str):
            return {**given, "encoding": (given["encoding"],)}
        return given

    def budget(self, kind: str) -> tuple[int, int]:
        """Return the atoms and edges of a batch on a kind of device, "cpu" or "cuda"."""
        atoms, edges = _BATCH.get(kind, _BATCH["cpu"])
        return self.batch_atoms or atoms, self.batch_edges or edges


# What a feature loss compares unless taps are given: the teacher's signal, the student's features.
OWN_TAPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "n2n": ("node", ("node",)),
    "e2n": ("e2n", ("node",)),
    "v2v": ("v2v", ("v2v",)),
    "e2e": ("edge", ("edge",)),
}
VANILLA_SIGNALS = {"vanilla1": ("energy", "forces"), "vanilla2": ("atomic_energies",)}


class KDTerm(Settings):
    """One distillation loss: weight x loss(head(student's features), teacher's signal).

    Taps are names of signals; `U4` is short for `layer/U4`, and a loss without taps takes its own.
    """

    name: Literal["n2n", "e2n", "v2v", "e2e", "vanilla1", "vanilla2"]
    teacher_tap: str = ""  # the signal to learn; none with vanilla losses
    student_taps: tuple[str, ...] = ()  # the features to learn it with, several one behind the other
    weight: float | Literal["auto"] = "auto"
    head: Literal["identity", "linear", "mlp"] = "linear"  # on the student's features; not vanilla
    loss: Literal["mse", "mae"] = "mse"  # not vanilla

    @property
    def signals(self) -> tuple[str, ...]:
        """The teacher's signals that the loss reads."""
        return VANILLA_SIGNALS.get(self.name) or (self.teacher_tap,)

    @property
    def label(self) -> str:
        """The term as it is written on the command line, without its weight: n2n, n2n:U4, n2n:H3->U2+U4."""
        taps = (self.teacher_tap, self.student_taps)
        if self.name in VANILLA_SIGNALS or taps == OWN_TAPS[self.name]:
            return self.name
        student = "+".join(tap.removeprefix("layer/") for tap in self.student_taps)
        if self.teacher_tap == OWN_TAPS[self.name][0]:
            return f"{self.name}:{student}"
        return f"{self.name}:{self.teacher_tap.removeprefix('layer/')}->{student}"

    @model_validator(mode="before")
    @classmethod
    def _name_taps(cls, values: Any) -> Any:
        own = OWN_TAPS.get(str(values.get("name"))) if isinstance(values, Mapping) else None
        if own is None:
            return values
        teacher, student = values.get("teacher_tap"), values.get("student_taps")
        chosen: dict[str, Any] = {"teacher_tap": teacher or own[0], "student_taps": student or own[1]}
        if isinstance(chosen["teacher_tap"], str):
            chosen["teacher_tap"] = _full_tap(chosen["teacher_tap"])
        if isinstance(chosen["student_taps"], list | tuple):
            chosen["student_taps"] = [
                _full_tap(t) if isinstance(t, str) else t for t in chosen["student_taps"]
            ]
        return {**values, **chosen}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "v2v" and self.head == "mlp":
            raise ValueError(
                "v2v takes head identity or linear: an MLP on vector components is not equivariant"
            )
        if self.weight != "auto" and not 0 < self.weight < math.inf:
            raise ValueError("the weight must be positive and finite")
        self._check_taps()
        return self

    def _check_taps(self) -> None:
        if self.name not in ("n2n", "e2n"):
            if (self.teacher_tap, self.student_taps) != OWN_TAPS.get(self.name, ("", ())):
                raise ValueError(f"{self.name} takes no taps; they go with n2n and e2n, as in n2n:H3->U4")
            return
        if len(set(self.student_taps)) < len(self.student_taps):
            raise ValueError(f"{self.label} names a tap of the student twice")
        of_layer = self.name == "n2n" and self.teacher_tap.startswith("layer/")
        if not of_layer and self.teacher_tap != OWN_TAPS[self.name][0]:
            raise ValueError(
                f"{self.label}: e2n learns the teacher's e2n, n2n its node or a layer; "
                "write n2n:H3->U4 for a layer"
            )
        wrong = [t for t in self.student_taps if t in ("v2v", "edge")]
        if wrong:
            raise ValueError(
                f"{self.label}: {wrong[0]} is no scalar feature of atoms; take node or layers, as in n2n:U4"
            )


def _full_tap(text: str) -> str:
    return text if "/" in text or text in ("node", "e2n", "v2v", "edge") else f"layer/{text}"


class ScheduleConfig(Settings):
    """Learning rate over steps: linear warm-up, then exponential decay, milestones or plateaus."""

    kind: Literal["warmup_exponential", "warmup_milestones", "plateau", "constant"] = "warmup_exponential"
    warmup_steps: int = Field(0, ge=0)
    warmup_factor: float = Field(0.2, gt=0, le=1)  # where the warm-up starts
    decay_rate: float = Field(0.01, gt=0, le=1)  # reached after decay_steps
    decay_steps: int | None = None  # None: the length of the run
    milestones: tuple[int, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)  # factor at each milestone or plateau
    patience: int = Field(3, ge=0)  # validations that may be no better before a plateau is called


class TrainingConfig(Settings):
    """How the weights move; presets fill it with the paper's Tables 5 and 6."""

    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    amsgrad: bool = True
    adam_eps: float = Field(1e-8, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decay: float | None = Field(0.999, ge=0, lt=1)
    clip_grad_norm: float | None = Field(10.0, gt=0)
    energy_weight: float = Field(1.0, ge=0)  # a_E of Eq. 1
    forces_weight: float = Field(100.0, ge=0)  # a_F of Eq. 1
    normalization: Literal["energy", "forces", "none"] = "energy"
    references: Literal["fit", "none"] | dict[int, float] = "fit"  # energy per element in eV
    max_epochs: int = Field(100, ge=1)
    max_steps: int | None = Field(None, ge=1)  # the smaller of both ends the run


class TrainConfig(Settings):
    """`kd train-student`: one run."""

    store: Place
    out: Path
    student: str
    model: dict[str, Any] = Field(default_factory=dict)  # the architecture's own settings
    training: TrainingConfig = TrainingConfig()
    kd: tuple[KDTerm, ...] = ()  # empty: no distillation
    teacher: str | None = None  # which one, if the store has several
    pseudo_labels: bool = False  # where a label is missing the base loss takes the teacher's
    rotated_targets: bool = False  # compare features in the basis of their encoding (pca), not decoded
    val: Place | None = None  # file or store; None: val_fraction of the store, by id
    val_fraction: float = Field(0.1, ge=0, lt=1)
    test: dict[str, Place] = Field(default_factory=dict)  # evaluated once at the end
    energy_key: str | None = None  # name of the energy in val and test files; None tries the usual ones
    forces_key: str | None = None
    val_every: int | None = Field(None, ge=1)  # steps; None: once an epoch, but at most 50 times a run
    checkpoint_every: int = Field(1000, ge=1)  # steps
    log_every: int = Field(50, ge=1)
    seed: int = Field(0, ge=0)
    device: str = "auto"
    amp: Literal["off", "bf16"] = "off"
    tensorboard: bool = False
    label: str = ""  # name of the run in reports

    @model_validator(mode="after")
    def _check(self) -> Self:
        labels = [term.label for term in self.kd]
        if len(set(labels)) != len(labels):
            raise ValueError("each KD loss can be given once, or with other taps")
        return self


S = TypeVar("S", bound=Settings)


def make_config(kind: type[S], *layers: Mapping[str, Any]) -> S:
    """Merge layers (later wins, nested mappings merge key by key) and validate.

    Raises
    ------
    ConfigError
        With every problem and, for an unknown key, the nearest valid one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        problems = [_explain(kind, problem) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from None


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``a.b=c`` strings into nested mappings; values are read as YAML."""
    result: dict[str, Any] = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text}: write it as key=value, for example training.lr=1e-3")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {text}: {value!r} cannot be read as a YAML value") from None
        if isinstance(parsed, str):
            parsed = _number(parsed)
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        result = _merge(result, parsed)
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # a parser's message has several lines
        raise ConfigError(f"{path}: cannot be read as YAML ({reason})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def dump_yaml(config: Settings) -> str:
    """Return the resolved settings as YAML that `read_yaml` and `make_config` turn back into them."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def parse_kd(texts: Sequence[str], head: str = "linear", loss: str = "mse") -> list[dict[str, Any]]:
    """Read ``--kd`` values: ``none``, or ``LOSS[:[TEACHER_TAP->]STUDENT_TAPS][=LAMBDA]``.

    Without LAMBDA, or with ``auto``, the weight is chosen from the data; several taps are joined by ``+``.
    """
    if "none" in texts and len(texts) > 1:
        raise ConfigError("--kd none cannot be combined with other losses")
    terms: list[dict[str, Any]] = []
    for text in texts:
        if text == "none":
            continue
        what, _, weight = text.partition("=")
        name, colon, taps = what.partition(":")
        number = "auto" if weight in ("", "auto") else _number(weight)
        if isinstance(number, str) and number != "auto":
            raise ConfigError(f"--kd {text}: the weight is a number or auto, for example {what}=1.0")
        term: dict[str, Any] = {"name": name, "weight": number, "loss": loss}
        term["head"] = "linear" if name == "v2v" and head == "mlp" else head
        terms.append(term | (_parse_taps(taps, text) if colon else {}))
    return terms


def _parse_taps(taps: str, text: str) -> dict[str, Any]:
    teacher, arrow, student = taps.rpartition("->")
    names = student.split("+")
    if taps.endswith("-"):  # a shell took "> U4" for itself
        raise ConfigError(f"--kd {text}: quote what holds ->, as in --kd 'n2n:H3->U4'")
    if not all(names) or bool(arrow) != bool(teacher):
        raise ConfigError(f"--kd {text}: a tap is missing; write n2n:U4, n2n:U2+U4 or 'n2n:H3->U4'")
    return {"student_taps": names} | ({"teacher_tap": teacher} if teacher else {})


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _number(text: str) -> float | str:
    try:
        return float(text)  # YAML reads 1e-3 as a string
    except ValueError:
        return text


def _explain(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location)
    if problem["type"] != "extra_forbidden":
        message = str(problem["msg"]).removeprefix("Value error, ")
        return f"{where}: {message} (found {problem['input']!r})" if where else message
    valid = _valid_keys(kind, location[:-1])
    nearest = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.0)
    prefix = ".".join(location[:-1] + nearest)
    return f"unknown setting {where}; did you mean {prefix}? valid here: {', '.join(valid)}"


def _valid_keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        inner = field.annotation if field else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            kind = inner
        elif not part.isdigit() and part == "kd":
            kind = KDTerm
    return sorted(kind.model_fields)
