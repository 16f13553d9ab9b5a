"""Settings of stage two: `kd train-student`."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from molkd.pipeline.config.base import Settings
from molkd.pipeline.config.kd import KDTerm
from molkd.pipeline.config.test_sets import SplitGroup
from molkd.pipeline.places import Place, resolved


class ScheduleConfig(Settings):
    """Learning rate over steps: linear warm-up, then exponential decay, milestones or plateaus."""

    # What follows the warm-up:
    kind: Literal["warmup_exponential", "warmup_milestones", "plateau", "constant"] = "warmup_exponential"
    warmup_steps: int = Field(0, ge=0)  # of the linear rise; 0: none
    warmup_factor: float = Field(0.2, gt=0, le=1)  # where the warm-up starts
    decay_rate: float = Field(0.01, gt=0, le=1)  # reached after decay_steps
    decay_steps: int | None = None  # None: the length of the run
    milestones: tuple[int, ...] = ()  # steps
    gamma: float = Field(0.1, gt=0, le=1)  # factor at each milestone or plateau
    patience: int = Field(3, ge=0)  # validations that may be no better before a plateau is called


class TrainingConfig(Settings):
    """How the weights move; presets fill it with the paper's Tables 5 and 6."""

    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)  # of AdamW, as the next two
    amsgrad: bool = True  # keep the largest second moment
    adam_eps: float = Field(1e-8, gt=0)  # added to the root of the second moment
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decay: float | None = Field(0.999, ge=0, lt=1)  # of the moving average of weights; None: no average
    clip_grad_norm: float | None = Field(10.0, gt=0)  # longest gradient; None: any
    energy_weight: float = Field(1.0, ge=0)  # a_E of Eq. 1
    forces_weight: float = Field(100.0, ge=0)  # a_F of Eq. 1
    # Beyond the paper, for students with direct forces: of the energy's slope against the labelled forces.
    gradient_weight: float = Field(0.0, ge=0)
    normalization: Literal["energy", "forces", "none"] = "energy"  # what scales the labels
    references: Literal["fit", "none"] | dict[int, float] = "fit"  # energy per element in eV
    max_epochs: int = Field(100, ge=1)  # passes over the training systems
    max_steps: int | None = Field(None, ge=1)  # the smaller of both ends the run


class MixConfig(Settings):
    """A further store, of which every batch takes a share (Eqs. 9 to 11)."""

    store: Place
    share: float = Field(0.25, gt=0, lt=1)  # of each batch, rounded to whole systems
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)  # k: weight of its systems over that of the others
    teacher: str | None = None  # its name there; None: the one that is the same teacher


class TrainConfig(Settings):
    """`kd train-student`: one run."""

    store: Place
    out: Path
    student: str
    model: dict[str, Any] = Field(default_factory=dict)  # the architecture's own settings
    training: TrainingConfig = TrainingConfig()
    kd: tuple[KDTerm, ...] = ()  # empty: no distillation
    kd_auto: bool = False  # the run chooses kd and pseudo_labels itself when it begins, see distill/recipe.py
    teacher: str | None = None  # which one, if the store has several
    pseudo_labels: bool = False  # where a label is missing the base loss takes the teacher's
    mix: tuple[MixConfig, ...] = ()  # further stores to train on
    rotated_targets: bool = False  # compare features in the basis of their encoding (pca), not decoded
    val: Place | None = None  # file or store; None: val_fraction of the store, by id
    val_fraction: float = Field(0.1, ge=0, lt=1)
    test: dict[str, Place] = Field(default_factory=dict)  # evaluated once at the end
    test_groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # of which the mean is told too
    energy_key: str | None = None  # name of the energy in val and test files; None tries the usual ones
    forces_key: str | None = None
    val_every: int | None = Field(None, ge=1)  # steps; None: once an epoch, but at most 50 times a run
    cka_systems: int = Field(64, ge=0)  # CKA of KD features with the teacher on so many; 0: none
    checkpoint_every: int = Field(1000, ge=1)  # steps
    log_every: int = Field(50, ge=1)  # steps; rows of metrics.csv
    seed: int = Field(0, ge=0)  # of weights and order
    device: str = "auto"
    amp: Literal["off", "bf16"] = "off"
    tensorboard: bool = False
    label: str = ""  # name of the run in reports

    @model_validator(mode="after")
    def _check(self) -> Self:
        labels = [term.label for term in self.kd]
        if len(set(labels)) != len(labels):
            raise ValueError("each KD loss can be given once, or with another head, loss or taps")
        groups = (SplitGroup(name, sets) for name, sets in self.test_groups.items())
        problems = [problem for group in groups if (problem := group.problem(self.test))]
        if problems:
            raise ValueError("; ".join(problems))
        if self.mix and self.rotated_targets:
            raise ValueError(
                "rotated_targets takes one store: with mix every store has a basis of its own; leave one out"
            )
        weighs = any(mix.weight != 1 for mix in self.mix)
        if weighs and any(term.loss == "cka" and term.student_taps for term in self.kd):
            raise ValueError("loss cka cannot weigh systems by origin; take mix weight 1, or mse, gsp or lsp")
        places = [resolved(place) for place in (self.store, *(mix.store for mix in self.mix))]
        if len(set(places)) < len(places):
            raise ValueError("mix: the same store twice; a share can be raised instead")
        return self
