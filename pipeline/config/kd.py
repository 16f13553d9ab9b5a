"""One distillation loss as a user asks for it, and how it is written on the command line."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from molkd.pipeline.config.base import Settings, number
from molkd.pipeline.errors import ConfigError

# What a feature loss compares unless taps are given: the teacher's signal, the student's features.
OWN_TAPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "n2n": ("node", ("node",)),
    "e2n": ("e2n", ("node",)),
    "v2v": ("v2v", ("v2v",)),
    "e2e": ("edge", ("edge",)),
}
OPTIONS = ("head", "loss", "delta")  # of a term on features, after its weight: n2n=10,head=mlp,loss=huber
STRUCTURE_LOSSES = ("cka", "gsp", "lsp")  # compare relations between atoms, so widths need not be equal
# Of the losses on outputs, which take no taps: the teacher's signals that they read.
OUTPUT_SIGNALS = {"vanilla1": ("energy", "forces"), "vanilla2": ("atomic_energies",), "grad": ("forces",)}

_OF_OTHER_KIND = {False: ("v2v", "edge"), True: ("node", "e2n", "edge")}  # by: is it a loss on vectors?


class KDTerm(Settings):
    """One distillation loss: weight x loss(head(student's features), teacher's signal).

    Taps are names of signals; `U4` is short for `layer/U4`, and a loss without taps takes its own.
    """

    name: Literal["n2n", "e2n", "v2v", "e2e", "vanilla1", "vanilla2", "grad"]
    teacher_tap: str = ""  # the signal to learn; none with vanilla losses
    student_taps: tuple[str, ...] = ()  # the features to learn it with, several one behind the other
    # lambda; "auto": as large as the loss on labels for a model that knows nothing, by statistics;
    # "balance": pulls at the fresh student's weights as hard as the loss on labels does
    weight: float | Literal["auto", "balance"] = "auto"
    fade: tuple[float, float] | None = None  # shares of the run between which the weight falls to zero
    head: Literal["identity", "linear", "mlp"] = "linear"  # on the student's features; not vanilla
    loss: Literal["mse", "mae", "huber", "cka", "gsp", "lsp"] = "mse"  # not vanilla
    delta: float = 1.0  # of huber: where squares turn into absolute values, in the signal's unit

    @property
    def signals(self) -> tuple[str, ...]:
        """The teacher's signals that the loss reads."""
        return OUTPUT_SIGNALS.get(self.name) or (self.teacher_tap,)

    @property
    def label(self) -> str:
        """The term as it is written on the command line, without its weight: n2n:H3->U2+U4,loss=huber."""
        return self._what + self._options

    @property
    def text(self) -> str:
        """The term as it is written on the command line: n2n:H3->U2+U4=10,loss=huber."""
        fade = ",fade={}:{}".format(*map(_short, self.fade)) if self.fade else ""
        return f"{self._what}={_short(self.weight)}{self._options}{fade}"

    @property
    def _options(self) -> str:
        """Every choice that is not the usual one; losses on outputs have none."""
        if self.name in OUTPUT_SIGNALS:
            return ""
        chosen = {key: value for key, usual in _USUAL.items() if (value := getattr(self, key)) != usual}
        return "".join(f",{key}={_short(value)}" for key, value in chosen.items())

    @property
    def _what(self) -> str:
        """Name and taps: n2n, n2n:U4, n2n:H3->U2+U4."""
        taps = (self.teacher_tap, self.student_taps)
        if self.name in OUTPUT_SIGNALS or taps == OWN_TAPS[self.name]:
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
        if self.name == "e2e" and self.loss in STRUCTURE_LOSSES:
            raise ValueError(f"loss {self.loss} compares atoms, e2e takes mse, mae or huber")
        if self.name == "v2v" and self.loss == "cka":
            raise ValueError(
                "v2v takes no loss cka: it compares atoms of different systems, and each may turn alone; "
                "take gsp or lsp, which stay within a system"
            )
        if not 0 < self.delta < math.inf or (self.delta != 1 and self.loss != "huber"):
            raise ValueError("delta goes with loss huber, and must be positive and finite")
        if not isinstance(self.weight, str) and not 0 < self.weight < math.inf:
            raise ValueError("the weight must be positive and finite")
        if self.fade is not None and not 0 <= self.fade[0] <= self.fade[1] <= 1:
            raise ValueError("fade is two shares of the run, the first no larger: [0.5, 0.8]")
        self._check_taps()
        return self

    def _check_taps(self) -> None:
        if self.name not in ("n2n", "e2n", "v2v"):
            if (self.teacher_tap, self.student_taps) != OWN_TAPS.get(self.name, ("", ())):
                raise ValueError(
                    f"{self.name} takes no taps; they go with n2n, e2n and v2v, as in n2n:H3->U4"
                )
            return
        if len(set(self.student_taps)) < len(self.student_taps):
            raise ValueError(f"{self.label} names a tap of the student twice")
        of_layer = self.name != "e2n" and self.teacher_tap.startswith("layer/")
        if not of_layer and self.teacher_tap != OWN_TAPS[self.name][0]:
            raise ValueError(
                f"{self.label}: e2n learns the teacher's e2n, n2n its node or a layer, v2v its v2v or a "
                "layer of vectors; write n2n:H3->U4 for a layer"
            )
        wrong = [t for t in self.student_taps if t in _OF_OTHER_KIND[self.name == "v2v"]]
        if wrong and self.name == "v2v":
            raise ValueError(
                f"{self.label}: {wrong[0]} is no vector feature of atoms; take v2v or layers of vectors, "
                "as in v2v:UV4"
            )
        if wrong:
            raise ValueError(
                f"{self.label}: {wrong[0]} is no scalar feature of atoms; take node or layers, as in n2n:U4"
            )


_USUAL = {key: KDTerm.model_fields[key].default for key in OPTIONS}


def _short(value: float | str) -> str:
    """Write 1.0 as 1 and 0.1 as 0.1, and no number shorter than it is."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _full_tap(text: str) -> str:
    return text if "/" in text or text in ("node", "e2n", "v2v", "edge") else f"layer/{text}"


AUTO = "auto"  # as the only text of --kd: the run chooses


def kd_settings(texts: Sequence[str], head: str = "linear", loss: str = "mse") -> dict[str, Any]:
    """Return what ``--kd`` texts say as settings of a run, ``kd`` and ``kd_auto``; see `parse_kd`."""
    if list(texts) == [AUTO]:
        return {"kd": [], "kd_auto": True}
    return {"kd": parse_kd(texts, head, loss), "kd_auto": False}


def parse_kd(texts: Sequence[str], head: str = "linear", loss: str = "mse") -> list[dict[str, Any]]:
    """Read ``--kd`` values: ``none``, or ``LOSS[:[TEACHER_TAP->]STUDENT_TAPS][=LAMBDA][,KEY=VALUE...]``.

    LAMBDA is a number, ``auto`` (also without it) or ``balance``; several taps are joined by ``+``.

    Parameters
    ----------
    head, loss : of the terms that do not choose their own (KEY is one of `OPTIONS`, or fade)
    """
    for alone in {"none", AUTO} & set(texts):
        if len(texts) > 1:
            raise ConfigError(f"--kd {alone} cannot be combined with other losses")
    return [_parse_term(text, head, loss) for text in texts if text != "none"]


def _parse_term(text: str, head: str, loss: str) -> dict[str, Any]:
    term, *options = text.split(",")
    what, _, weight = term.partition("=")
    name, colon, taps = what.partition(":")
    value = number(weight or "auto")
    if isinstance(value, str) and value not in ("auto", "balance"):
        raise ConfigError(f"--kd {text}: the weight is a number, auto or balance, for example {what}=1.0")
    usual = {"head": "linear" if name == "v2v" and head == "mlp" else head, "loss": loss}
    chosen = _parse_options(options, text)
    if name in OUTPUT_SIGNALS:
        usual = {}
        if set(chosen) - {"fade"}:
            raise ConfigError(f"--kd {text}: {name} takes neither head nor loss, it compares outputs")
    return {"name": name, "weight": value} | usual | chosen | (_parse_taps(taps, text) if colon else {})


def _parse_options(options: Sequence[str], text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in (*OPTIONS, "fade") or not value or key in found:
            raise ConfigError(
                f"--kd {text}: {option!r} is no choice; after the weight stand {', '.join(OPTIONS)}, fade, "
                "each once, as in n2n=10,head=mlp,loss=huber,fade=0.5:0.8"
            )
        found[key] = [number(share) for share in value.split(":")] if key == "fade" else number(value)
    return found


def _parse_taps(taps: str, text: str) -> dict[str, Any]:
    teacher, arrow, student = taps.rpartition("->")
    names = student.split("+")
    if taps.endswith("-"):  # a shell took "> U4" for itself
        raise ConfigError(f"--kd {text}: quote what holds ->, as in --kd 'n2n:H3->U4'")
    if not all(names) or bool(arrow) != bool(teacher):
        raise ConfigError(f"--kd {text}: a tap is missing; write n2n:U4, n2n:U2+U4 or 'n2n:H3->U4'")
    return {"student_taps": names} | ({"teacher_tap": teacher} if teacher else {})
