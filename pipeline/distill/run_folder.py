"""The folder of one training run: settings, log, metrics, last.pt to go on from, best.safetensors to keep."""

import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from molkd.pipeline.config import TrainConfig, dump_yaml, make_config, read_yaml
from molkd.pipeline.errors import BusyError, ConfigError, IntegrityError
from molkd.pipeline.files import locked_folder, write_atomic

_MAY_CHANGE = {
    "out",
    "store",
    "device",
    "checkpoint_every",
    "log_every",
    "cka_systems",
    "tensorboard",
    "label",
    "test",
    "test_groups",
    "val",
}


class RunFolder:
    """Where a run keeps what it needs to go on, and what others read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.safetensors"
        self._config = path / "config.yaml"
        self._last = path / "last.pt"
        self._metrics = path / "metrics.csv"
        self._summary = path / "metrics.json"
        self._columns: list[str] = []

    def open(self, config: TrainConfig) -> None:
        """Write config.yaml, or check that a run that has begun there has the same settings.

        Raises
        ------
        ConfigError
            If the folder holds a run with other settings; nothing in it is touched.
        """
        if differ := self.differing(config):
            raise ConfigError(
                f"{self.path}: holds a run with other settings ({', '.join(differ)}); "
                "give another --out, or remove the folder to start over"
            )
        write_atomic(self._config, dump_yaml(config))

    def with_recipe(self, config: TrainConfig) -> TrainConfig:
        """Return the settings with the losses that a run with `kd_auto`, which has begun here, has chosen."""
        if not (self._config.exists() and self.has_begun):
            return config
        old = make_config(TrainConfig, read_yaml(self._config))
        return config.model_copy(update={"kd": old.kd, "pseudo_labels": old.pseudo_labels})

    @property
    def has_begun(self) -> bool:
        """Whether there is anything of a run inside."""
        return any(file.exists() for file in (self._metrics, self._last, self._summary))

    @property
    def is_busy(self) -> bool:
        """Whether another process is training in the folder at this moment."""
        try:
            with self.locked():
                return False
        except BusyError:
            return True
        except (FileNotFoundError, NotADirectoryError):
            return False

    def differing(self, config: TrainConfig) -> list[str]:
        """Return which settings that matter a run that has begun there has otherwise."""
        if not (self._config.exists() and self.has_begun):
            return []
        old, new = (_what_matters(c) for c in (make_config(TrainConfig, read_yaml(self._config)), config))
        return [key for key in new if new[key] != old.get(key, new[key])]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises
        ------
        BusyError
            If another process is training in this folder.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(self.path))
            except BlockingIOError:
                raise BusyError(
                    f"{self.path}: another process is training in this folder; wait for it, "
                    "or give another --out"
                ) from None
            yield

    @contextmanager
    def log_to_file(self) -> Iterator[None]:
        """Append the log of the package to log.txt."""
        handler = logging.FileHandler(self.path / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("molkd").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("molkd").removeHandler(handler)
            handler.close()

    def finished(self) -> dict[str, Any] | None:
        """Return the content of metrics.json if the run is complete."""
        return json.loads(self._summary.read_text()) if self._summary.exists() else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write metrics.json: the run is complete."""
        write_atomic(self._summary, json.dumps(summary, indent=2, default=str) + "\n")

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace last.pt."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomic(self._last, buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """Return what `save_state` kept, or None in a fresh folder."""
        if not self._last.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._last, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError) as error:
            raise IntegrityError(
                f"{self._last}: damaged checkpoint ({error}); remove it to start this run over"
            ) from None
        return state

    def start_metrics(self, columns: list[str], step: int) -> None:
        """Begin metrics.csv, or drop the rows that a continued run will write again."""
        self._columns = columns
        rows: list[dict[str, str]] = []
        if self._metrics.exists():
            with self._metrics.open(newline="") as file:
                rows = [
                    r
                    for r in csv.DictReader(file)
                    if (r.get("step") or "").isdigit() and int(r["step"]) <= step
                ]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self._metrics, buffer.getvalue())

    def add_metrics(self, row: Mapping[str, float | int]) -> None:
        """Append one row; a missing column stays empty."""
        with self._metrics.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, extrasaction="ignore").writerow(
                {key: _cell(value) for key, value in row.items()}
            )


def _what_matters(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a run keeps; stores may move, what they hold is checked elsewhere."""
    chosen = {"kd", "pseudo_labels"} if config.kd_auto else set()  # once, when the run began
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in _MAY_CHANGE | chosen}
    return settings | {"mix": [{k: v for k, v in mix.items() if k != "store"} for mix in settings["mix"]]}


def _cell(value: float | int) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else f"{value:.8g}"
