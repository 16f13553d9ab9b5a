"""Random rattling: the noise is what was asked for, and the same for the same seed."""

import numpy as np
from augment_cases import ethanol, system
from stage_one_cases import write_extxyz

from molkd.pipeline.augment.rattle import Rattle, rattled
from molkd.pipeline.augment.starts import draw_parents
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.config.augment import RattleConfig


def test_noise_has_the_standard_deviation_along_each_axis():
    parent = system(ethanol())
    noise = np.stack(
        [rattled(parent, 0.07, np.random.default_rng(k)) - parent.positions for k in range(2000)]
    )
    spread, mean = noise.std(axis=(0, 1)), noise.mean(axis=(0, 1))  # of 18,000 numbers: 0.5 % and 0.0005 A
    np.testing.assert_allclose(spread, 0.07, rtol=0.025)
    np.testing.assert_allclose(mean, 0, atol=0.0026)


def test_fixed_atoms_stay_unless_told_otherwise():
    parent = system(ethanol(), fixed=(0, 4))
    stays = rattled(parent, 0.1, np.random.default_rng(0)) == parent.positions
    assert stays.all(axis=1).tolist() == [k in (0, 4) for k in range(9)]
    moves = rattled(parent, 0.1, np.random.default_rng(0), move_fixed=True) != parent.positions
    assert moves.all()


def make(path, **settings):
    cache = CacheConfig(store=path.with_name("out.kdcache"), teacher="none")
    config = RattleConfig(cache=cache, data=path, **settings)
    with draw_parents(path, None, config.seed, []) as parents:
        method = Rattle(config, parents)
        return method.make(range(method.n_starts), {})


def test_every_system_with_every_sigma_and_copy(tmp_path):
    parents = [system(ethanol(k)) for k in range(3)]
    path = write_extxyz(tmp_path / "data.extxyz", [ethanol(k) for k in range(3)])
    frames = make(path, sigma=(0.01, 0.2), copies=2)
    expected = sorted((p.id.hex(), sigma) for p in parents for sigma in (0.01, 0.2) for _ in range(2))
    assert sorted((f.made["parent"], f.made["sigma"]) for f in frames) == expected
    by_id = {p.id.hex(): p for p in parents}
    for frame in frames:
        rms = (frame.system.positions - by_id[frame.made["parent"]].positions).std()
        assert 0.5 < rms / frame.made["sigma"] < 1.6  # of 27 numbers


def test_a_seed_says_it_all(tmp_path):
    path = write_extxyz(tmp_path / "data.extxyz", [ethanol(k) for k in range(3)])
    first, again, other = ([f.system.id for f in make(path, sigma=(0.05,), n=7, seed=s)] for s in (1, 1, 2))
    assert first == again
    assert len(set(first)) == 7
    assert not set(first) & set(other)
