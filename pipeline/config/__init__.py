"""Typed settings. Defaults live here; later wins: defaults < preset < YAML < --set < flags."""

from molkd.pipeline.config.base import (
    Settings,
    dump_yaml,
    make_config,
    merged,
    nested,
    parse_assignments,
    read_yaml,
)
from molkd.pipeline.config.kd import (
    OPTIONS,
    OUTPUT_SIGNALS,
    OWN_TAPS,
    STRUCTURE_LOSSES,
    KDTerm,
    kd_settings,
    parse_kd,
)
from molkd.pipeline.config.stage_one import CacheConfig, IngestConfig, parse_part
from molkd.pipeline.config.test_sets import SplitGroup, parse_groups
from molkd.pipeline.config.training import MixConfig, ScheduleConfig, TrainConfig, TrainingConfig

__all__ = [
    "OPTIONS",
    "OUTPUT_SIGNALS",
    "OWN_TAPS",
    "STRUCTURE_LOSSES",
    "CacheConfig",
    "IngestConfig",
    "KDTerm",
    "MixConfig",
    "ScheduleConfig",
    "Settings",
    "SplitGroup",
    "TrainConfig",
    "TrainingConfig",
    "dump_yaml",
    "kd_settings",
    "make_config",
    "merged",
    "nested",
    "parse_assignments",
    "parse_groups",
    "parse_kd",
    "parse_part",
    "read_yaml",
]
