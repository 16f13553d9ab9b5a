"""Stage two, read from top to bottom: a student learns from labels and from the cached teacher.

No teacher runs here, and nothing of `teachers` or `caching` is imported.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.data.system import System
from molkd.pipeline.device import choose_device
from molkd.pipeline.distill.balance import balance_weights
from molkd.pipeline.distill.cka_metric import cka_columns, prepare_cka
from molkd.pipeline.distill.held_out import read_held_out, read_systems, validation_systems
from molkd.pipeline.distill.loader import Sample
from molkd.pipeline.distill.optim import count_plateaus, lr_factor
from molkd.pipeline.distill.recipe import automatic
from molkd.pipeline.distill.run_folder import RunFolder
from molkd.pipeline.distill.scale_factors import fit_on_first_batches
from molkd.pipeline.distill.step import TrainState, accumulate, initial_state, train_step
from molkd.pipeline.distill.student import Setup, prepare, record_weights
from molkd.pipeline.environment import environment
from molkd.pipeline.errors import CacheError, DivergedError, ModelError
from molkd.pipeline.evaluation.breakdown import KINDS
from molkd.pipeline.evaluation.evaluate import evaluate
from molkd.pipeline.evaluation.result import FOLDER, Evaluation
from molkd.pipeline.evaluation.splits import mean_report, split_groups
from molkd.pipeline.interrupts import interruptible
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.progress import Progress

log = logging.getLogger(__name__)

_MAX_VALIDATIONS = 50  # a run validates once an epoch, but not more often than this
_VALIDATION_BATCH = 64  # systems
_TEST_BATCH = 32  # as `kd evaluate` and `kd report` take, so that throughputs compare


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
    test_means: dict[str, dict[str, float | None]] = field(default_factory=dict)  # over groups of test sets


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
    if config.kd_auto and not run.has_begun:
        config = automatic(Cache.open(config.store), config)
    elif config.kd_auto:
        config = run.with_recipe(config)
    run.open(config)
    if (done := run.finished()) is not None:
        log.info("%s: finished before, nothing to do", config.out)
        return TrainSummary(**{k: done[k] for k in TrainSummary.__dataclass_fields__ if k in done})
    with run.locked(), run.log_to_file():
        return _train(config, run)


def _train(config: TrainConfig, run: RunFolder) -> TrainSummary:
    device = choose_device(config.device)
    cache = Cache.open(config.store)
    held_out = read_held_out(config)
    setup = prepare(cache, config, device, held_out.ids)
    state = initial_state(cache, setup, config, device)
    total_steps, val_every = run_length(state.loader.batches_per_epoch, config)
    val_systems = validation_systems(cache, setup, config, held_out)
    data = _data_of(cache, setup, val_systems)
    if (saved := run.load_state()) is not None:
        _check_same_data(config, saved.get("data", {}), data)
        state.load_state_dict(saved)
        log.info("continuing at step %d of %d", state.step, total_steps)
    else:
        fit_on_first_batches(state)
        balance_weights(state, config)
    record_weights(setup)
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
    part_names = ["loss", *setup.objective.part_names]
    run.start_metrics(_columns(part_names) + cka_columns(config.kd), state.step)
    cka = prepare_cka(cache, setup, config, device)

    with (
        interruptible() as interrupted,
        _tensorboard(config, run, state.step) as writer,
        Progress(total_steps, "train", "step", state.step) as progress,
    ):
        mark = time.perf_counter()
        for sample in _until(state, total_steps):
            terms = train_step(state, sample, config, device, total_steps)
            accumulate(state, terms)
            state.step += 1
            last = state.step == total_steps
            validates = last or state.step % val_every == 0
            losses = None
            if validates or state.step % config.log_every == 0:
                losses = _mean_losses(state, config)  # waits for the device, so that the clock below is right
            state.seconds += time.perf_counter() - mark  # waiting for data included, validation not
            progress.update()
            if losses is not None:
                row = _row(state, part_names, losses, config, total_steps)
                if validates:
                    row |= _validate(state, val_systems, run, config, device) | cka.measure(state.averaged)
                run.add_metrics(row)
                _to_tensorboard(writer, row)
            if interrupted() or last or state.step % config.checkpoint_every == 0:
                run.save_state(state.state_dict() | {"data": data})
            if interrupted():
                log.warning(
                    "interrupted at step %d of %d; the same command continues", state.step, total_steps
                )
                break
            mark = time.perf_counter()

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
        _means(config, test),
    )
    if finished:
        extra = {
            "student": config.student,
            "label": config.label,
            "seed": config.seed,
            "kd": dict(setup.objective.weights),
            "teacher": setup.potential.metadata["provenance"]["teacher"],
            "store": str(config.store),
            "dataset_fingerprint": cache.fingerprint,
            "data": setup.potential.metadata["provenance"]["data"],
            "environment": environment(device),
        }
        if setup.mixed:
            extra["mix"] = setup.potential.metadata["provenance"]["mix"]
        run.finish(vars(summary) | extra)
    return summary


def run_length(batches_per_epoch: int, config: TrainConfig) -> tuple[int, int]:
    """Return the number of steps and after how many to validate."""
    total = config.training.max_epochs * batches_per_epoch
    if config.training.max_steps is not None:
        total = min(total, config.training.max_steps)
    return total, config.val_every or max(batches_per_epoch, math.ceil(total / _MAX_VALIDATIONS))


def _data_of(cache: Cache, setup: Setup, val_systems: list[System]) -> dict[str, Any]:
    """Return what tells the data of two runs apart, wherever they lie."""
    mixed = [(store.cache.fingerprint.encode(), store.cache.ids[store.train]) for store in setup.mixed]
    data = {"mixed systems": _sha256(b"".join(f + i.tobytes() for f, i in mixed))} if mixed else {}
    return data | {
        "systems": cache.fingerprint,
        "teacher": setup.potential.metadata["provenance"]["teacher"],
        "training systems": _sha256(cache.ids[setup.train].tobytes()),
        "validation systems": _sha256(b"".join(s.id for s in val_systems)),
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_same_data(config: TrainConfig, old: dict[str, Any], new: dict[str, Any]) -> None:
    differ = [key for key in old if old[key] != new.get(key)]
    if differ:
        raise CacheError(
            f"{config.store}: other {' and '.join(differ)} than those that {config.out} was begun with; "
            "give the same store, --mix and --val again, or another --out"
        )


def _until(state: TrainState, total_steps: int) -> Iterator[Sample]:
    samples = iter(state.loader)
    try:
        while state.step < total_steps:
            yield next(samples)
    finally:
        samples.close()  # type: ignore[attr-defined]  # a generator: this stops the prefetch thread


def _mean_losses(state: TrainState, config: TrainConfig) -> list[float]:
    """Return the mean of the loss and its parts since the last call."""
    assert state.sums is not None
    means: list[float] = (state.sums / state.n_summed).tolist()
    state.sums, state.n_summed = None, 0
    if not math.isfinite(means[0]):
        raise DivergedError(
            f"{config.out}: the loss is not finite around step {state.step}; "
            "lower training.lr or the weight of --kd, or remove the folder and start with --amp off"
        )
    return means


def _row(
    state: TrainState, part_names: list[str], losses: list[float], config: TrainConfig, total_steps: int
) -> dict[str, float | int]:
    factor = lr_factor(config.training.schedule, state.step - 1, total_steps, state.n_plateaus)
    return {
        "step": state.step,
        "epoch": state.loader.epoch,
        "lr": config.training.lr * factor,
        "seconds": state.seconds,
        **{f"train_{name}": value for name, value in zip(part_names, losses, strict=True)},
    }


def _columns(part_names: list[str]) -> list[str]:
    validation = ["val_energy_mae_meV", "val_force_mae_meV_A", "val_force_cos", "val_efwt_percent"]
    return ["step", "epoch", "lr", "seconds", *(f"train_{n}" for n in part_names), *validation]


def _validate(
    state: TrainState, systems: list[System], run: RunFolder, config: TrainConfig, device: torch.device
) -> dict[str, float | int]:
    """Evaluate the averaged weights; keep them if they are the best so far."""
    model = state.averaged
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
    is_best = score < state.best
    state.n_stale, state.n_plateaus = count_plateaus(
        state.n_stale, state.n_plateaus, is_best=is_best, patience=config.training.schedule.patience
    )
    if is_best:
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
        batch_size=_TEST_BATCH if measure_throughput else _VALIDATION_BATCH,
        device=device,
        measure_throughput=measure_throughput,
        breakdowns=KINDS if measure_throughput else (),
        weights_sha256=potential.weights_sha256,
    )


def _test(config: TrainConfig, run: RunFolder, device: torch.device) -> dict[str, dict[str, float | None]]:
    if not config.test:
        return {}
    best = Potential.load(run.best, device)
    results = {}
    for name, path in config.test.items():
        evaluation = _evaluate(best, read_systems(path, config), device, measure_throughput=True)
        evaluation.save(run.path / FOLDER / f"{name}.npz")
        results[name] = evaluation.to_report()
    return results


def _means(
    config: TrainConfig, test: dict[str, dict[str, float | None]]
) -> dict[str, dict[str, float | None]]:
    """Return the mean over each group of test sets, every set with the same weight."""
    means = {}
    for group in split_groups(config.test_groups, test) if test else ():
        means[group.name], problems = mean_report(group, test)
        for problem in problems:
            log.warning("%s", problem)
    return means


@contextmanager
def _tensorboard(config: TrainConfig, run: RunFolder, step: int) -> Iterator[Any]:
    """Open the event file; of earlier ones the rows beyond `step`, which are made again, stop counting."""
    if not config.tensorboard:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModelError("tensorboard is not installed; pip install 'molkd[tensorboard]'") from None
    with SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1) as writer:
        yield writer


def _to_tensorboard(writer: Any, row: dict[str, float | int]) -> None:
    if writer is not None:
        for key, value in row.items():
            if key != "step":
                writer.add_scalar(key.replace("_", "/", 1), value, row["step"])
        writer.flush()
