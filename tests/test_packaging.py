"""The wheel holds the package and nothing else, under one name."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache_schema", "pipeline")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".tmp-*")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel from a copy of the sources; setuptools would leave its own files in them."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "tests", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=IGNORED)
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, copy)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(copy)]
    # Without isolation where setuptools is new enough: no network is needed then.
    for options in (["--no-isolation"], []):
        done = subprocess.run([*build, *options], capture_output=True, text=True)
        if done.returncode == 0:
            return next(out.glob("*.whl"))
    if "Could not find a version" in done.stdout + done.stderr or "No module named build" in done.stderr:
        pytest.skip(
            "no wheel can be built: setuptools >= 77 is neither installed nor to be had from an index"
        )
    raise AssertionError(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def source_files(*patterns):
    return {p for folder in FOLDERS for pattern in patterns for p in (ROOT / folder).rglob(pattern)}


@pytest.mark.slow
def test_wheel_holds_every_module_and_nothing_else(names, project):
    code = {p.relative_to(ROOT) for p in source_files("*.py")}
    version = project["project"]["version"]
    metadata = {name for name in names if name.startswith(f"molkd-{version}.dist-info/")}
    in_package = {Path(name).relative_to("molkd") for name in names - metadata}  # fails on another top level
    assert {p for p in in_package if p.suffix == ".py"} == {*code, Path("cli.py")}
    assert f"molkd-{version}.dist-info/licenses/LICENSE" in metadata


@pytest.mark.slow
def test_wheel_holds_the_data_that_the_code_reads(names, project):
    declared = project["tool"]["setuptools"]["package-data"]
    expected = set()
    for package, patterns in declared.items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        expected |= {p.relative_to(ROOT) for pattern in patterns for p in folder.glob(pattern)}
    data = {Path(name).relative_to("molkd") for name in names if name.startswith("molkd/")}
    assert {p for p in data if p.suffix != ".py"} == expected
    presets = {p.name for p in (ROOT / "pipeline" / "models" / "presets").iterdir()}
    assert {p.name for p in expected if p.suffix == ".yaml" and p.parts[1] == "models"} == presets
    assert len(presets) > 5
    studies = {p.name for p in (ROOT / "pipeline" / "study" / "examples").iterdir()}
    assert {p.name for p in expected if p.parts[:2] == ("pipeline", "study")} == studies
    in_demo = {p.suffix for p in expected if p.parts[:2] == ("pipeline", "demo")}
    assert in_demo >= {".xz", ".safetensors", ".md"}


def test_every_folder_with_code_is_a_listed_package(project):
    settings = project["tool"]["setuptools"]
    assert settings["package-dir"] == {"molkd": "."}
    assert not (ROOT / "__init__.py").exists()
    folders = {p.parent.relative_to(ROOT).parts for p in source_files("__init__.py")}
    assert set(settings["packages"]) == {"molkd"} | {".".join(("molkd", *f)) for f in folders}
    with_code = {p.parent.relative_to(ROOT).parts for p in source_files("*.py")}
    assert with_code == folders  # none forgot its __init__.py


def test_nothing_in_the_root_would_be_swept_into_the_wheel():
    assert {p.name for p in ROOT.glob("*.py")} == {"cli.py"}


def test_packages_are_imported_by_name_in_adapters_only():
    """The import contracts see statements; `import_module` would pass them by."""
    using = {p.relative_to(ROOT) for p in source_files("*.py") if "import_module(" in p.read_text()}
    assert {p.parent for p in using} == {Path("pipeline/teachers")}


def test_scripts(project):
    assert project["project"]["scripts"] == {"kd": "molkd.cli:main", "molkd": "molkd.cli:main"}
    installed = {e.name: e for e in entry_points(group="console_scripts") if e.value == "molkd.cli:main"}
    assert set(installed) == {"kd", "molkd"}
    assert callable(installed["kd"].load())


def test_constraints_pin_every_dependency(project):
    """Every direct dependency of every extra has one exact version that its own range allows."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines if line}
    declared = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        declared += extra
    missing = []
    for requirement in map(Requirement, declared):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            missing.append(requirement.name)
            continue
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version, prereleases=True), (requirement, pin)
    assert missing == []


def test_installed_metadata_is_that_of_the_sources(project):
    """An outdated installation would test something else than the clone."""
    from packaging.requirements import Requirement

    installed = {Requirement(r).name for r in requires("molkd") or [] if "extra ==" not in r}
    assert installed == {Requirement(r).name for r in project["project"]["dependencies"]}
