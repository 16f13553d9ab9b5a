"""Stage two, read from top to bottom: a student learns from labels and from the cached teacher.

No teacher runs here, and nothing of `teachers` or `caching` is imported.
"""

import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.data.system import System
from molkd.pipeline.device import choose_device
from molkd.pipeline.distill.heads import Objective
from molkd.pipeline.distill.loader import CacheLoader, Sample, sample_to
from molkd.pipeline.distill.losses import LossTerms, fill_labels
from molkd.pipeline.distill.optim import lr_factor, make_ema, make_optimizer
from molkd.pipeline.distill.run_folder import RunFolder
from molkd.pipeline.distill.student import Setup, prepare
from molkd.pipeline.errors import ModelError
from molkd.pipeline.evaluation.evaluate import evaluate
from molkd.pipeline.evaluation.result import FOLDER, Evaluation
from molkd.pipeline.models.potential import Potential

log = logging.getLogger(__name__)

_MAX_VALIDATIONS = 50  # a run validates once an epoch, but not more often than this
_EVALUATION_BATCH = 64  # systems


@dataclass(frozen=True)
class TrainSummary:
    """Where a run ended."""

    run: str
    finished: bool
    steps: int
    seconds: float  # of training, without validation
    n_parameters: int
    best_step: int
    val: dict[str, float | None]
    test: dict[str, dict[str, float | None]]


@dataclass
class _State:
    """Everything that changes during a run, and that resuming brings back exactly."""

    potential: Potential
    objective: Objective
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    loader: CacheLoader
    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    best_val: dict[str, float | None] | None = None
    sums: Tensor | None = None  # of the loss and its parts since the last row of metrics.csv
    n_summed: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.potential.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "loader": self.loader.state_dict(),
            "counters": {
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "best_step": self.best_step,
                "best_val": self.best_val,
                "sums": self.sums,
                "n_summed": self.n_summed,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.potential.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.loader.load_state_dict(state["loader"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        if self.sums is not None:
            self.sums = self.sums.to(self.potential.device)


def train_student(config: TrainConfig) -> TrainSummary:
    """Train one student; the same call continues an interrupted run and skips a finished one.

    Raises
    ------
    CacheError, IntegrityError
        If the store does not fit, is unfinished, or bytes of it are damaged.
    ConfigError, DataError, ModelError
        If settings, labels or losses make no sense; see the message.
    """
    run = RunFolder(config.out)
    run.open(config)
    if (done := run.finished()) is not None:
        log.info("%s: finished before, nothing to do", config.out)
        return TrainSummary(**{k: done[k] for k in TrainSummary.__dataclass_fields__})
    handler = run.log_to_file()
    try:
        return _train(config, run)
    finally:
        logging.getLogger("molkd").removeHandler(handler)
        handler.close()


def _train(config: TrainConfig, run: RunFolder) -> TrainSummary:
    device = choose_device(config.device)
    cache = Cache.open(config.store)
    setup = prepare(cache, config, device)
    state = _initial_state(cache, setup, config, device)
    total_steps, val_every = _length(state.loader.batches_per_epoch, config)
    if (saved := run.load_state()) is not None:
        state.load_state_dict(saved)
        log.info("continuing at step %d of %d", state.step, total_steps)
    n_parameters = sum(p.numel() for p in setup.potential.model.parameters())
    log.info(
        "%s: %d parameters, %d training systems, %d steps of %d systems on %s",
        config.student,
        n_parameters,
        int(setup.train.sum()),
        total_steps,
        config.training.batch_size,
        device,
    )
    val_systems = _validation_systems(cache, setup, config)
    part_names = ["loss", "energy", "forces", *(t.name for t in config.kd)]
    run.start_metrics(_columns(part_names), state.step)
    writer = _tensorboard(config, run)

    with (
        _interruptible() as interrupted,
        tqdm(total=total_steps, initial=state.step, desc="train", unit="step", disable=None) as progress,
    ):
        for sample in _until(state, total_steps):
            began = time.perf_counter()
            terms = _step(state, sample, config, device, total_steps)
            _accumulate(state, terms)
            state.step += 1
            state.seconds += time.perf_counter() - began
            progress.update()
            row: dict[str, float | int] = {}
            if state.step % config.log_every == 0 or state.step % val_every == 0 or state.step == total_steps:
                row = _training_row(state, part_names, config, total_steps)
            if state.step % val_every == 0 or state.step == total_steps:
                row |= _validate(state, val_systems, run, device)
            if row:
                run.add_metrics(row)
                _to_tensorboard(writer, row)
            if interrupted() or state.step % config.checkpoint_every == 0 or state.step == total_steps:
                run.save_state(state.state_dict())
            if interrupted():
                log.warning(
                    "interrupted at step %d of %d; the same command continues", state.step, total_steps
                )
                break

    finished = state.step >= total_steps
    test = _test(config, run, device) if finished else {}
    summary = TrainSummary(
        str(config.out),
        finished,
        state.step,
        state.seconds,
        n_parameters,
        state.best_step,
        state.best_val or {},
        test,
    )
    if finished:
        extra = {
            "student": config.student,
            "label": config.label,
            "seed": config.seed,
            "kd": {t.name: setup.objective.weights[t.name] for t in config.kd},
            "teacher": setup.potential.metadata["provenance"]["teacher"],
            "store": str(config.store),
            "dataset_fingerprint": cache.fingerprint,
        }
        run.finish(vars(summary) | extra)
    return summary


def _initial_state(cache: Cache, setup: Setup, config: TrainConfig, device: torch.device) -> _State:
    model = setup.potential.model
    model.train()
    return _State(
        potential=setup.potential,
        objective=setup.objective,
        optimizer=make_optimizer([*model.parameters(), *setup.objective.parameters()], config.training),
        ema=make_ema(model, config.training.ema_decay) if config.training.ema_decay else None,
        loader=CacheLoader(
            cache,
            setup.train,
            setup.potential.neighbor_rule,
            setup.potential.scale,
            batch_size=config.training.batch_size,
            seed=config.seed,
            teacher=setup.teacher,
            signals=setup.signals,
            pin=device.type == "cuda",
        ),
    )


def _length(batches_per_epoch: int, config: TrainConfig) -> tuple[int, int]:
    """Return the number of steps and after how many to validate."""
    total = config.training.max_epochs * batches_per_epoch
    if config.training.max_steps is not None:
        total = min(total, config.training.max_steps)
    return total, config.val_every or max(batches_per_epoch, math.ceil(total / _MAX_VALIDATIONS))


def _until(state: _State, total_steps: int) -> Iterator[Sample]:
    samples = iter(state.loader)
    try:
        while state.step < total_steps:
            yield next(samples)
    finally:
        samples.close()  # type: ignore[attr-defined]  # a generator: this stops the prefetch thread


def _step(
    state: _State, sample: Sample, config: TrainConfig, device: torch.device, total_steps: int
) -> LossTerms:
    """One step of Eq. 2, with no synchronisation with the device."""
    training = config.training
    for group in state.optimizer.param_groups:
        group["lr"] = training.lr * lr_factor(training.schedule, state.step, total_steps)
    batch, targets = sample_to(sample, device)
    if config.pseudo_labels:
        targets = fill_labels(targets)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
        outputs = state.potential.model(batch)
        terms = state.objective(outputs, targets)
    state.optimizer.zero_grad(set_to_none=True)
    terms.total.backward()
    if training.clip_grad_norm:
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, training.clip_grad_norm)
    state.optimizer.step()
    if state.ema:
        state.ema.update_parameters(state.potential.model)
    return terms


def _accumulate(state: _State, terms: LossTerms) -> None:
    values = torch.stack([terms.total.detach(), *(p.detach() for p in terms.parts.values())]).double()
    state.sums = values if state.sums is None else state.sums + values
    state.n_summed += 1


def _training_row(
    state: _State, part_names: list[str], config: TrainConfig, total_steps: int
) -> dict[str, float | int]:
    assert state.sums is not None
    means = (state.sums / state.n_summed).tolist()
    state.sums, state.n_summed = None, 0
    if not math.isfinite(means[0]):
        raise ModelError(
            f"{config.out}: the loss is not finite around step {state.step}; "
            "lower training.lr or the weight of --kd, or remove the folder and start with --amp off"
        )
    return {
        "step": state.step,
        "epoch": state.loader.epoch,
        "lr": config.training.lr * lr_factor(config.training.schedule, state.step - 1, total_steps),
        "seconds": state.seconds,
        **{f"train_{name}": value for name, value in zip(part_names, means, strict=True)},
    }


def _columns(part_names: list[str]) -> list[str]:
    validation = ["val_energy_mae_meV", "val_force_mae_meV_A", "val_force_cos", "val_efwt_percent"]
    return ["step", "epoch", "lr", "seconds", *(f"train_{n}" for n in part_names), *validation]


def _validation_systems(cache: Cache, setup: Setup, config: TrainConfig) -> list[System]:
    if config.val is not None:
        source = open_source(config.val)
        try:
            return [source.read(i) for i in range(len(source))]
        finally:
            source.close()
    held_out = StoreSource(cache)
    return [held_out.read(int(i)) for i in np.flatnonzero(setup.val)]


def _validate(
    state: _State, systems: list[System], run: RunFolder, device: torch.device
) -> dict[str, float | int]:
    """Evaluate the averaged weights; keep them if they are the best so far."""
    model = state.ema.module if state.ema else state.potential.model
    averaged = Potential(model, state.potential.scale, state.potential.metadata)
    if not systems:
        state.best_step = state.step
        averaged.save(run.best)
        return {}
    model.eval()
    metrics = _evaluate(averaged, systems, device, measure_throughput=False).metrics
    model.train()
    score = metrics.force_mae if metrics.n_force_atoms else metrics.energy_mae
    report = metrics.to_report()
    if score < state.best:
        state.best, state.best_step, state.best_val = score, state.step, report
        averaged.save(run.best)
    log.info("step %d: %s", state.step, {k: round(v, 4) for k, v in report.items() if v is not None})
    return {f"val_{key}": value for key, value in report.items() if value is not None}


def _evaluate(
    potential: Potential, systems: Iterable[System], device: torch.device, *, measure_throughput: bool
) -> Evaluation:
    return evaluate(
        potential.predict,
        systems,
        potential.neighbor_rule,
        batch_size=_EVALUATION_BATCH,
        device=device,
        measure_throughput=measure_throughput,
    )


def _test(config: TrainConfig, run: RunFolder, device: torch.device) -> dict[str, dict[str, float | None]]:
    if not config.test:
        return {}
    best = Potential.load(run.best, device)
    results = {}
    for name, path in config.test.items():
        source = open_source(path)
        try:
            systems = (source.read(i) for i in range(len(source)))
            evaluation = _evaluate(best, systems, device, measure_throughput=True)
        finally:
            source.close()
        evaluation.save(run.path / FOLDER / f"{name}.npz")
        results[name] = evaluation.to_report()
    return results


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Turn SIGINT and SIGTERM into a flag, so that the current step ends and a checkpoint is written."""
    caught: list[int] = []
    handlers: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda n, _: caught.append(n))
    except ValueError:
        pass  # not the main thread: whoever runs us handles signals
    try:
        yield lambda: bool(caught)
    finally:
        for caught_number, handler in handlers.items():
            signal.signal(caught_number, handler)


def _tensorboard(config: TrainConfig, run: RunFolder) -> Any:
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModelError("tensorboard is not installed; pip install 'molkd[tensorboard]'") from None
    return SummaryWriter(str(run.path / "tensorboard"))


def _to_tensorboard(writer: Any, row: dict[str, float | int]) -> None:
    if writer is not None:
        for key, value in row.items():
            if key != "step":
                writer.add_scalar(key.replace("_", "/", 1), value, row["step"])
        writer.flush()
