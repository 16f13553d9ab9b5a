"""`kd augment`: one function a sub-command, from its settings to the summary."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from molkd.pipeline.augment.adversarial import Adversarial
from molkd.pipeline.augment.flow import AugmentSummary, Origin, augment
from molkd.pipeline.augment.look import Looking
from molkd.pipeline.augment.molecules import Molecules, require_molecule
from molkd.pipeline.augment.rattle import Rattle
from molkd.pipeline.augment.starts import Parents, draw_parents
from molkd.pipeline.augment.surfaces import Surfaces
from molkd.pipeline.caching import open_teacher, scope_of
from molkd.pipeline.config.augment import (
    AdversarialConfig,
    AugmentConfig,
    MoleculesConfig,
    RattleConfig,
    SurfacesConfig,
)
from molkd.pipeline.data.system import System
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.places import resolved
from molkd.pipeline.scope import Scope


def augment_rattle(config: RattleConfig) -> AugmentSummary:
    """Rattle every system of the data at random.

    Raises
    ------
    ConfigError, DataError, ModelError, TeacherError, CacheError
        As `draw_parents`, `augment` and `cache_teacher`.
    """
    looking = _looking(config)
    n_parents = None if config.n is None else -(-config.n // len(config.sigma))
    with _parents(config, config.data, n_parents, scope_of(looking.teacher).check) as parents:
        return augment(Rattle(config, parents), _origin("rattle", parents), config, looking)


def augment_adversarial(config: AdversarialConfig) -> AugmentSummary:
    """Rattle systems towards where the student is farthest from the teacher.

    Raises
    ------
    ConfigError, DataError, ModelError, TeacherError, CacheError
        As `augment_rattle`; also if neither energies nor forces are to be compared.
    """
    if config.energy_weight == config.forces_weight == 0:
        raise ConfigError("nothing to compare: give --energy-weight or --forces-weight a value above zero")
    looking = _looking(config)
    device = looking.teacher.device
    student = Potential.load(Path(config.student).expanduser(), device).to(device, looking.teacher.dtype)
    student.model.requires_grad_(False)
    scope = Scope(config.student, student.elements, student.neighbor_rule)
    with _parents(config, config.data, config.n, scope_of(looking.teacher).check, scope.check) as parents:
        origin = _origin(
            "adversarial", parents, student=config.student, student_sha256=student.weights_sha256
        )
        return augment(Adversarial(config, parents, student, looking), origin, config, looking)


def augment_surfaces(config: SurfacesConfig) -> AugmentSummary:
    """Put adsorbates on slabs and relax them.

    Raises
    ------
    ConfigError, DataError, ModelError, TeacherError, CacheError
        As `augment_rattle`; also if a crystal, a facet or an adsorbate cannot be had.
    """
    looking = _looking(config)
    if not looking.teacher.neighbor_rule.use_pbc:
        raise ConfigError(
            f"{config.cache.teacher}: ignores cells, and surfaces are periodic; take a teacher that sees them"
        )
    method = Surfaces.of(config, looking)
    inputs = {"crystals_sha256": method.fingerprint}
    facts = {
        "bulk_names": sorted({b.name for b in method.bulks}),
        "adsorbate_names": sorted({n for n, _ in method.adsorbates}),
    }
    return augment(method, Origin("surfaces", inputs, facts), config, looking)


def augment_molecules(config: MoleculesConfig) -> AugmentSummary:
    """Displace molecules, and relax or move them.

    Raises
    ------
    ConfigError, DataError, ModelError, TeacherError, CacheError
        As `augment_rattle`; DataError also for a periodic system.
    """
    looking = _looking(config)
    with _parents(
        config, config.data, config.n, scope_of(looking.teacher).check, require_molecule
    ) as parents:
        return augment(Molecules(config, parents, looking), _origin("molecules", parents), config, looking)


def _looking(config: AugmentConfig) -> Looking:
    teacher = open_teacher(config.cache)
    return Looking(teacher, *config.cache.budget(torch.device(teacher.device).type))


def _parents(
    config: AugmentConfig, data: Path | str, n: int | None, *checks: Callable[[System], None]
) -> AbstractContextManager[Parents]:
    if resolved(data) == config.cache.store.resolve():
        raise ConfigError(f"{data}: new structures go to a store of their own; name another one for them")
    return draw_parents(data, n, config.seed, checks)


def _origin(method: str, parents: Parents, **student: str) -> Origin:
    inputs = {"drawn_fingerprint": parents.fingerprint}
    inputs |= {key: value for key, value in student.items() if key.endswith("sha256")}
    facts = {"parent_data": parents.facts, **student}
    return Origin(method, inputs, facts, parents.roots, parents.licence, parents.citation)
