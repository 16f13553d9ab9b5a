"""How a study is carried out: where its runs are made, and which of them."""

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from molkd.pipeline.config import Settings, parse_part


class StudyOptions(Settings):
    """Flags of `kd study`; nothing here changes results but for their last bits."""

    jobs: int | None = Field(None, ge=1)  # runs side by side on this machine
    threads: int | None = Field(None, ge=1)  # of each run
    scheduler: str | None = None  # of a Dask cluster whose workers make the runs
    worker: tuple[int, int] | None = None  # (i, n) or "i/n": of n processes the i-th makes every n-th run
    only: str | None = None  # shell pattern of run folders
    retry: bool = False  # also what diverged

    @field_validator("worker", mode="before")
    @classmethod
    def _part(cls, given: Any) -> Any:
        return parse_part(given)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.scheduler is not None and (self.jobs is not None or self.worker is not None):
            raise ValueError(
                "--scheduler leaves it to the cluster who makes which run; leave --jobs and --worker out"
            )
        return self
