"""Settings of stage one: `kd ingest` and `kd cache-teacher`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from molkd.pipeline.config.base import Settings
from molkd.pipeline.places import Place


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
    # How the structures were made, if here: kept in the store as `augmentation` among the facts on its data.
    augmentation: dict[str, JsonValue] | None = None
    parents: dict[str, JsonValue] | None = None  # what each was made from, by source: see data/lineage.py


def parse_part(given: Any) -> tuple[int, int] | None:
    """Read "i/n": the i-th, from 0, of n processes that share work.

    Raises
    ------
    ValueError
        If it is nothing of the kind.
    """
    if given is None:
        return None
    parts = given.split("/") if isinstance(given, str) else given
    if isinstance(parts, list | tuple) and len(parts) == 2 and all(str(p).isdecimal() for p in parts):
        index, of = (int(part) for part in parts)
        if index < of:
            return index, of
    raise ValueError("write it as i/n with i from 0 to n - 1, for example 0/4, 1/4, 2/4 and 3/4")


_BATCH = {"cpu": (1024, 60_000), "cuda": (16_384, 1_000_000)}  # atoms, edges


class CacheConfig(Settings):
    """`kd cache-teacher`: one pass of the teacher over a store."""

    store: Path
    teacher: str
    scale_file: Path | None = None  # scale factors, for an OCP checkpoint that holds none
    signals: tuple[str, ...] = Field(("energy", "forces", "atomic_energies", "node"), min_length=1)
    name: str | None = None  # of the teacher's group in the store; None takes the teacher's own
    # Of features: one for all, or SIGNAL=ENCODING; else int8, or fp16 in small stores. Energies and forces
    # are never narrowed.
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
        return parse_part(given)

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
