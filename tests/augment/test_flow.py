"""From a command to a store: what is in it, what a kill does to it, and what is refused."""

import json
import sys
from contextlib import closing

import numpy as np
import pytest
from ase.build import bulk
from ase.constraints import FixAtoms
from augment_cases import ethanol
from stage_one_cases import make_store, write_extxyz

from molkd.cache_schema.reader import Cache
from molkd.pipeline.augment import flow
from molkd.pipeline.augment.molecules import DIVERGED
from molkd.pipeline.augment.record import Record
from molkd.pipeline.augment.run import (
    augment_adversarial,
    augment_molecules,
    augment_rattle,
    augment_surfaces,
)
from molkd.pipeline.augment.sifting import shortest_contact
from molkd.pipeline.augment.starts import draw_parents
from molkd.pipeline.config import CacheConfig, make_config
from molkd.pipeline.config.augment import (
    AdversarialConfig,
    MoleculesConfig,
    RattleConfig,
    SurfacesConfig,
)
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.teachers.load import load_teacher

SIGNALS = ("energy", "forces", "node")


def rattle(files, store, **settings):
    cache = CacheConfig(store=store, teacher=str(files / "smooth.safetensors"), signals=SIGNALS)
    return RattleConfig(cache=cache, data=files / "molecules.extxyz", **{"copies": 2, **settings})


def molecules(files, store, **settings):
    cache = CacheConfig(store=store, teacher=str(files / "smooth.safetensors"), signals=SIGNALS)
    given = {"relax_steps": 6, "frames": 3, "max_force": 1e3, **settings}
    return MoleculesConfig(cache=cache, data=files / "molecules.extxyz", **given)


def surfaces(files, store, **settings):
    cache = CacheConfig(store=store, teacher=str(files / "metal.safetensors"), signals=SIGNALS)
    given = {
        "n": 4,
        "bulks": ("Cu",),
        "facets": ("111",),
        "adsorbates": ("CO",),
        "relax_steps": 3,
        **settings,
    }
    return SurfacesConfig(cache=cache, min_lateral=5.0, min_thickness=4.0, vacuum=12.0, **given)


def test_a_store_without_labels_and_with_all_of_its_origin(files, tmp_path):
    store = tmp_path / "rattled.kdcache"
    summary = augment_rattle(rattle(files, store))
    assert (summary.n_starts, summary.n_made, summary.n_kept) == (12, 12, 12)
    with Cache.open(store) as cache:
        assert np.isnan(cache.energy).all()
        arrays = cache.read(
            range(12), ("forces", "positions"), teacher="smooth", signals=("energy", "forces")
        )
        assert np.isnan(arrays["forces"]).all()
        facts = cache.dataset["augmentation"]
        (known,) = cache.dataset["parents"].values()
        teacher = load_teacher(str(files / "smooth.safetensors"), device="cpu")
        with_teacher = flow.Looking(teacher, 10_000, 10**6).look(systems_of(store))
        np.testing.assert_allclose(arrays["teacher/energy"], [s.energy for s in with_teacher], rtol=1e-6)
        rows = np.array(cache.source_row)
    parents = {system.id.hex(): system for system in systems_of(files / "molecules.extxyz")}
    assert sorted(known["ids"]) == sorted(parents)
    for k, system in enumerate(systems_of(store)):  # each lies around the parent that the store names
        parent = parents[known["ids"][known["of"][rows[k]]]]
        displaced = np.abs(system.positions - parent.positions)
        assert 0 < displaced.max() < 0.3
    recipe = facts["recipe"]
    assert recipe["method"] == "rattle"
    assert recipe["sigma"] == [0.05]
    assert recipe["teacher"] == teacher.info.weights_sha256


def systems_of(data):
    with closing(open_source(data)) as source:
        return [source.read(k) for k in range(len(source))]


@pytest.mark.parametrize("method", [rattle, molecules, surfaces])
def test_a_killed_run_goes_on_to_the_same_store(files, tmp_path, monkeypatch, method):
    """Killed in the middle, with half a chunk behind the last whole one."""
    monkeypatch.setattr(flow, "CHUNK", 2)
    run = {rattle: augment_rattle, molecules: augment_molecules, surfaces: augment_surfaces}[method]
    whole, cut = tmp_path / "whole" / "out.kdcache", tmp_path / "cut" / "out.kdcache"
    monkeypatch.chdir(whole.parent.parent)
    expected = run(method(files, whole))
    kept = flow.within_forces
    calls = []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(*arguments)

    monkeypatch.setattr(flow, "within_forces", dies)
    with pytest.raises(KeyboardInterrupt):
        run(method(files, cut))
    assert not cut.exists()
    monkeypatch.setattr(flow, "within_forces", kept)
    record = Record(cut)
    done = json.loads((record.folder / "progress.json").read_text())
    assert done["n_done"] == 2
    with record.structures.open("ab") as file:
        file.write(b"9\nhalf a frame")
    summary = run(method(files, cut))
    assert (summary.n_kept, summary.dropped) == (expected.n_kept, expected.dropped)
    assert Record(whole).structures.read_bytes() == record.structures.read_bytes()
    with Cache.open(whole) as one, Cache.open(cut) as two:
        assert one.fingerprint == two.fingerprint
        parents = [list(cache.dataset.pop("parents", {}).values()) for cache in (one, two)]  # by file
        assert parents[0] == parents[1]
        assert one.dataset == two.dataset
        arrays = [
            c.read(range(c.n_systems), ("positions",), teacher=summary.teacher, signals=SIGNALS)
            for c in (one, two)
        ]
    for key, values in arrays[0].items():
        assert (values == arrays[1][key]).all(), key


def test_the_same_command_again_does_nothing(files, tmp_path):
    config = rattle(files, tmp_path / "out.kdcache")
    augment_rattle(config)
    store = {p: p.read_bytes() for p in (tmp_path / "out.kdcache").rglob("*") if p.is_file()}
    again = augment_rattle(config)
    assert again.n_kept == 12
    for path in Record(config.cache.store).folder.iterdir():  # as the docs say, it may be deleted
        path.unlink()
    Record(config.cache.store).folder.rmdir()
    assert augment_rattle(config).n_kept == 12
    assert {p: p.read_bytes() for p in (tmp_path / "out.kdcache").rglob("*") if p.is_file()} == store


def test_starts_in_another_order_or_with_other_fixed_atoms_are_other_starts(files, tmp_path):
    data = tmp_path / "data.extxyz"
    frames = [ethanol(seed) for seed in range(3)]

    def fingerprint(frames):
        write_extxyz(data, frames)
        with draw_parents(data, None, 0, ()) as parents:
            return parents.fingerprint

    held = [atoms.copy() for atoms in frames]
    held[1].set_constraint(FixAtoms([0]))
    made = [fingerprint(given) for given in (frames, frames, frames[::-1], held)]
    assert made[0] == made[1]
    assert len(set(made)) == 3


def test_more_signals_are_added(files, tmp_path):
    config = rattle(files, tmp_path / "out.kdcache")
    augment_rattle(config)
    more = config.model_copy(
        update={"cache": config.cache.model_copy(update={"signals": ("atomic_energies",)})}
    )
    assert set(augment_rattle(more).signals) == {"atomic_energies"}
    with Cache.open(tmp_path / "out.kdcache") as cache:
        assert set(cache.teachers["smooth"].signals) == {*SIGNALS, "atomic_energies"}


def test_what_is_refused(files, tmp_path):
    cache = {"store": tmp_path / "far", "teacher": "t"}
    with pytest.raises(ConfigError, match="sigma"):  # atoms so far apart end the process in the search
        make_config(RattleConfig, {"cache": cache, "data": files, "sigma": [1e7]})
    store = tmp_path / "out.kdcache"
    augment_rattle(rattle(files, store))
    with pytest.raises(ConfigError, match=r"made otherwise \(seed\)"):
        augment_rattle(rattle(files, store, seed=1))
    with pytest.raises(ConfigError, match=r"made otherwise \(n_starts, sigma\)"):
        augment_rattle(rattle(files, store, sigma=(0.1, 0.2)))
    for wrong in ({"sigma": [0.1, -0.1]}, {"sigma": []}, {"copies": 0}, {"n": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make_config(RattleConfig, rattle(files, store).model_dump() | wrong)
    foreign = tmp_path / "foreign.kdcache"
    make_store(foreign, files / "molecules.extxyz")
    with pytest.raises(ConfigError, match="not made"):
        augment_rattle(rattle(files, foreign))
    same = rattle(files, foreign).model_copy(update={"data": foreign})
    with pytest.raises(ConfigError, match="a store of their own"):
        augment_rattle(same)
    with pytest.raises(DataError, match=r"nothing is left of 12 structures.*12 forces too large"):
        augment_rattle(rattle(files, tmp_path / "none.kdcache", max_force=1e-9))
    assert not (tmp_path / "none.kdcache").exists()
    nothing = AdversarialConfig(
        cache=CacheConfig(store=store, teacher="none"), data=store, student="none", energy_weight=0
    )
    with pytest.raises(ConfigError, match="nothing to compare"):
        augment_adversarial(nothing)


def test_adversarial_from_a_run_to_a_store(files, tmp_path):
    cache = CacheConfig(
        store=tmp_path / "hard.kdcache", teacher=str(files / "direct.safetensors"), signals=SIGNALS
    )
    config = AdversarialConfig(
        cache=cache,
        data=files / "molecules.extxyz",
        student=str(files / "smooth.safetensors"),
        steps=3,
        max_force=1e4,
    )
    summary = augment_adversarial(config)
    assert summary.n_kept == 6
    assert summary.means["mean_discrepancy"] > summary.means["mean_discrepancy_at_start"]
    parents = {system.id.hex(): system for system in systems_of(files / "molecules.extxyz")}
    for frame in Record(cache.store).frames():
        away = np.linalg.norm(frame.system.positions - parents[frame.made["parent"]].positions, axis=1)
        assert away.max() <= 0.1 + 1e-6
        assert frame.made["discrepancy"] >= frame.made["discrepancy_at_start"]


def test_surfaces_keep_conventions_and_drop_by_reason(files, tmp_path):
    store = tmp_path / "slabs.kdcache"
    summary = augment_surfaces(surfaces(files, store, n=6, sites=("ontop", "hollow"), facets=("111", "211")))
    frames = list(Record(store).frames())
    assert summary.n_kept == len(frames) > 3
    for frame in frames:
        made, tags = frame.made, frame.system.tags
        assert set(tags.tolist()) == {0, 1, 2}
        assert (frame.system.fixed == (tags == 0)).all()
        assert sorted(frame.system.atomic_numbers[tags == 2].tolist()) == [6, 8]
        assert (made["bulk"], made["adsorbate"]) == ("Cu", "CO")
        assert made["site"] == "ontop" if made["facet"] == "111" else made["site"] in ("ontop", "hollow")
        assert shortest_contact(frame.system) >= 0.6
    starts = {f.made["start"]: f for f in frames if f.made["step"] == 0}
    for frame in frames:  # what is fixed does not move, the rest does
        if frame.made["start"] in starts and frame.made["step"] > 0:
            moved = frame.system.positions != starts[frame.made["start"]].system.positions
            assert not moved[frame.system.fixed].any()
            assert moved[~frame.system.fixed].any()
    nothing = surfaces(files, tmp_path / "none.kdcache", sites=("fcc",), facets=("100",))
    with pytest.raises(DataError, match="4 no such site"):
        augment_surfaces(nothing)
    with pytest.raises(ConfigError, match="does not know"):
        augment_surfaces(surfaces(files, tmp_path / "none.kdcache", bulks=("Pt",)))


def test_crystals_of_one_name_are_two(files, tmp_path):
    for folder, symbol in (("first", "Cu"), ("second", "Au")):
        (tmp_path / folder).mkdir()
        bulk(symbol, cubic=True).write(tmp_path / folder / "POSCAR")
    bulks = tuple(str(tmp_path / folder / "POSCAR") for folder in ("first", "second"))
    given = {"facets": ("111",), "n": 8, "bulks": bulks, "frames": 1, "relax_steps": 0, "max_force": 1e6}
    store = tmp_path / "slabs.kdcache"
    augment_surfaces(surfaces(files, store, **given))
    metals = {int(frame.system.atomic_numbers[0]) for frame in Record(store).frames()}
    assert metals == {29, 79}


def test_what_diverges_is_counted(files, tmp_path):
    config = molecules(files, tmp_path / "out.kdcache", max_force=1e-9)
    with pytest.raises(DataError, match=f"6 {DIVERGED}"):
        augment_molecules(config)


def test_the_command_line(files, tmp_path, capsys, monkeypatch):
    from molkd.cli import main  # noqa: TID251

    write_extxyz(tmp_path / "data.extxyz", [ethanol(k) for k in range(3)])
    out = tmp_path / "out.kdcache"
    words = [
        "kd",
        "augment",
        "rattle",
        tmp_path / "data.extxyz",
        out,
        "--teacher",
        files / "direct.safetensors",
    ]
    words += [
        "--sigma",
        "0.02",
        "--sigma",
        "0.04",
        "--n",
        "4",
        "--signals",
        "energy,forces",
        "--max-force",
        "1e4",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    main()
    summary = json.loads(capsys.readouterr().out)
    assert (summary["n_kept"], summary["signals"]) == (4, {"energy": "fp64", "forces": "fp32"})
    monkeypatch.setattr(sys, "argv", ["kd", "cache", "info", str(out)])
    main()
    assert "made by kd augment rattle, seed 0: 4 of 4 structures kept" in capsys.readouterr().out
