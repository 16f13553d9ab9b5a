"""Commands on stores that lie on a server: the same results as on the local one."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from distill_cases import COLL, column, make_store, train_config, write_part

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.remote import publish
from molkd.cli import kd  # noqa: TID251
from molkd.pipeline.config import parse_kd, read_yaml
from molkd.pipeline.distill.train import train_student

sys.path.insert(0, str(Path(__file__).parents[1] / "cache_schema"))

from servers import BUCKET, S3_ENVIRONMENT, s3_server


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def url(store, endpoint, tmp_path, monkeypatch):
    """The store with a teacher's signals, in a bucket."""
    for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MOLKD_CACHE", str(tmp_path / "mirrors"))
    url = f"s3://{BUCKET}/{tmp_path.name}/coll.kdcache"
    publish(store, url)
    return url


def run(*arguments: object) -> str:
    done = CliRunner().invoke(kd, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_student_trained_from_a_bucket_is_that_of_the_local_store(store, url, tmp_path):
    part = make_store(tmp_path / "part.kdcache", write_part(tmp_path / "part.extxyz", 0, 8))
    test_url = url.replace("coll", "part")
    publish(part, test_url)
    changes = {"kd": parse_kd(["n2n=1", "v2v=1"]), "training": {"max_steps": 4}}
    for place, test, out in ((store, part, tmp_path / "local"), (url, test_url, tmp_path / "remote")):
        train_student(train_config(place, out, test={"part": test}, **changes))
    for name in ("train_loss", "train_n2n", "train_v2v"):
        assert column(tmp_path / "remote", name) == column(tmp_path / "local", name)
    config = read_yaml(tmp_path / "remote" / "config.yaml")
    assert (config["store"], config["test"]) == (url, {"part": test_url})
    results = [
        json.loads((tmp_path / run / "metrics.json").read_text())["test"] for run in ("local", "remote")
    ]
    assert results[0]["part"]["force_mae_meV_A"] == results[1]["part"]["force_mae_meV_A"]


def test_commands_take_urls(store, url, teacher_file, tmp_path):
    assert json.loads(run("cache", "info", url, "--json"))["teachers"]
    run("cache", "verify", url, "--quick")
    (listed,) = json.loads(run("cache", "ls", url.rpartition("/")[0], "--json"))["stores"]
    assert (listed["store"], listed["health"], listed["systems"]) == (url, "ok", 48)
    run("cache", "overlay", url, tmp_path / "mine.kdcache")
    assert json.loads(run("cache", "info", tmp_path / "mine.kdcache", "--json"))["overlay_of"] == url
    evaluated = [json.loads(run("evaluate", teacher_file, place, "--json")) for place in (url, COLL)]
    assert evaluated[0]["force_mae_meV_A"] == pytest.approx(evaluated[1]["force_mae_meV_A"], rel=1e-5)
    run("ingest", url, tmp_path / "again.kdcache")
    with Cache.open(tmp_path / "again.kdcache") as cache, Cache.open(store) as local:
        assert cache.fingerprint == local.fingerprint
        assert cache.source_names == (url,)


@pytest.mark.parametrize("command", [("ingest", COLL), ("cache-teacher",), ("cache-teacher", COLL)])
def test_what_writes_refuses_urls(url, teacher_file, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    extra = ("--teacher", teacher_file) if command[0] == "cache-teacher" else ()
    done = CliRunner().invoke(kd, [str(a) for a in (*command, url, *extra)])
    assert "stores on servers are only read; copy it to a local folder first" in str(done.exception)
    assert not (tmp_path / "s3:").exists()
