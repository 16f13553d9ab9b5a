"""`kd demo`: both stages on bundled molecules, done the way a user would, in under three minutes."""

import logging
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, IngestConfig, KDTerm, TrainConfig, make_config
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.evaluating import report_runs
from molkd.pipeline.evaluation.report import Report
from molkd.pipeline.ingest import ingest
from molkd.pipeline.models.registry import load_preset

log = logging.getLogger(__name__)

_STUDENT = "painn-tiny"
_STEPS = 1200
_SIGNALS = ("energy", "forces", "atomic_energies", "node", "v2v")
_KD = (KDTerm(name="n2n"), KDTerm(name="v2v"))


@dataclass(frozen=True)
class DemoSummary:
    """What the demo found."""

    folder: str
    seconds: float
    report: Report

    def text(self) -> str:
        """Return the table and where to look next."""
        return (
            f"{self.report.text()}\n\n"
            f"{self.seconds:.0f} s in all. Report with pictures: {self.report.page}\n"
            f"Store: {Path(self.folder) / 'demo.kdcache'} (kd cache info, kd cache verify)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"folder": self.folder, "seconds": self.seconds, "report": self.report.to_dict()}


def run_demo(out: Path) -> DemoSummary:
    """Ingest, cache the teacher, train a student without and with KD, and compare; all computed now.

    The teacher is a PaiNN with conservative forces trained by `kd train-student --kd none` on coll-gfn2
    (collisions of small C, H, O molecules, GFN2-xTB labels, CC0); see its card beside the data.
    """
    began = time.perf_counter()
    store = out / "demo.kdcache"
    package = files("molkd.pipeline.demo")
    with (
        as_file(package / "train.extxyz.xz") as train,
        as_file(package / "test.extxyz.xz") as test,
        as_file(package / "painn-coll-gfn2.safetensors") as teacher,
    ):
        log.info("1/4 structures and labels into %s", store)
        ingest(IngestConfig(data=(train,), store=store, licence="CC0-1.0", citation="molkd coll-gfn2"))
        log.info("2/4 the teacher looks at every system once")
        cache_teacher(CacheConfig(store=store, teacher=str(teacher), signals=_SIGNALS))
        runs: list[Path] = []
        for label, kd in (("without KD", ()), ("with KD", _KD)):
            log.info("%d/4 student %s", 3 + len(runs), label)
            run = out / "runs" / label.replace(" ", "-")
            train_student(
                make_config(
                    TrainConfig,
                    load_preset(_STUDENT, periodic=False),
                    {"training": {"max_steps": _STEPS, "max_epochs": _STEPS}},
                    {"store": store, "out": run, "student": _STUDENT, "kd": kd, "label": label},
                    {"val_every": 300, "test": {"test": test}},
                )
            )
            runs.append(run)
        report = report_runs(runs, out / "report", teacher=str(teacher), test=(test,))
    return DemoSummary(str(out), time.perf_counter() - began, report)
