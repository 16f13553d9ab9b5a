import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent


def _load(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_HELPERS = (
    "cache_example", "golden_v1", "servers", "remote_example", "hostile_edits", "hostile_stores",
    "hostile_attempts", "operations_oracle", "operations_children", "operations_writing",
)  # fmt: skip
for _name in _HELPERS:
    _load(_name)  # tests say: from cache_example import ...

from cache_example import create, make_example, write_all  # noqa: E402
from servers import S3, S3_ENVIRONMENT, s3_server, web_server  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """Skip waiting for the disk; only a power cut, which no test makes, would show the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def example():
    return make_example([5, 300, 17, 1, 1024, 80, 700, 33, 512, 2, 90, 400], seed=7)


@pytest.fixture
def store_path(tmp_path, example):
    """A finished store of its own for tests that damage it."""
    path = tmp_path / "x.kdcache"
    write_all(path, example)
    return path


@pytest.fixture
def store(tmp_path, example):
    """A store of its own without any rows yet."""
    return create(tmp_path / "x.kdcache", example)


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """An empty folder for mirrors."""
    folder = tmp_path / "mirrors"
    monkeypatch.setenv("MOLKD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def s3_endpoint():
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint, mirrors, monkeypatch):
    for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": s3_endpoint}).items():
        monkeypatch.setenv(name, value)
    return S3(s3_endpoint)


@pytest.fixture
def web(tmp_path, mirrors):
    """A web server over a folder, in which stores are put."""
    folder = tmp_path / "web"
    folder.mkdir()
    with web_server(folder) as server:
        yield server


@pytest.fixture
def open_folder():
    """A temporary folder that every user may enter, for tests that become another; pytest's are private."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        if not all(parent.stat().st_mode & 0o001 for parent in folder.parents):
            pytest.skip(f"other users may not enter {folder.parent}")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def local(tmp_path_factory, example):
    """A finished store that no test changes."""
    path = tmp_path_factory.mktemp("local") / "x.kdcache"
    write_all(path, example)
    return path


@pytest.fixture
def published(web, local):
    """The same store behind a web server; returns the folder served, which tests may damage."""
    return shutil.copytree(local, web.folder / "x.kdcache")


@pytest.fixture
def run_script():
    """Run one of this folder's scripts in a fresh interpreter and return what it printed."""

    def run(name: str, *arguments: object, timeout: float = 240) -> str:
        path = [str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, _FOLDER / name, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
