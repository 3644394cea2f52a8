"""Objects in a directory, in S3, GCS and Azure: whole or not at all, under their owner's prefix, and a sentence for each failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from proxy.errors import ConfigError, StorageError
from proxy.storage.objects import Objects, owner_path
from tests.services import S3, buckets

OWNER = bytes(range(18))


@pytest.fixture(params=["directory", "file", "s3", "gs", "az"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "directory":
        return Objects(f"{tmp_path}/a b", {}, 10, "tiers.l3")
    (bucket,) = buckets(request, tmp_path / "a%20b", request.param)
    return Objects(bucket["url"], bucket.get("options", {}), 10, "tiers.l3")


def test_what_is_put_is_found_in_whole_and_in_part_and_deleted(store: Objects) -> None:
    assert store.get("a/b") is None and list(store.names()) == []
    store.put("a/b", b"\x00one")
    store.put("a/b", b"\x00two")
    assert store.get("a/b") == b"\x00two"
    assert (store.get("a/b", 1, 3), store.get("a/b", 2, 99)) == (b"tw", b"wo")
    assert list(store.names()) == list(store.names("a")) == [("a/b", 4)] and list(store.names("b")) == []
    store.put("large", large := os.urandom(6 << 20))  # in several parts
    assert store.get("large") == large
    store.delete(["a/none", "a/b", "none", "large"])
    assert list(store.names()) == [] and store.get("a/b") is None and store.trouble is None


@pytest.mark.parametrize("size", [6, 12, 18])
async def test_all_of_an_owner_go_and_no_others(store: Objects, size: int) -> None:
    other = OWNER[: size - 1] + b"\xff" + OWNER[size:]
    for owner in (OWNER, other):
        for name in ("one", "two"):
            store.put(f"{owner_path(owner)}/{name}", b"x")
    path = owner_path(OWNER)
    assert sorted(await store.drop(OWNER[:size])) == [f"{path}/one", f"{path}/two"]
    assert sorted(name for name, _ in store.names()) == [f"{owner_path(other)}/one", f"{owner_path(other)}/two"]
    assert await store.drop(OWNER[:size]) == []


async def test_a_kill_in_the_middle_of_writing_leaves_no_half_object_and_nothing_behind_a_drop(tmp_path: Path) -> None:
    code = """
        import sys
        from proxy.storage.objects import Objects, owner_path
        store = Objects(sys.argv[1], {}, 10, "tiers.l3")
        for n in range(10_000):
            store.put(f"{owner_path(bytes(18))}/{n}", bytes([n % 251]) * 300_000)
            print(n, flush=True)
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(6)]
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    store = Objects(str(tmp_path), {}, 10, "tiers.l3")
    names = [name for name, _ in store.names()]
    assert {int(name.rpartition("/")[2]) for name in names} >= set(told)
    for name in names:
        assert store.get(name) == bytes([int(name.rpartition("/")[2]) % 251]) * 300_000
    (tmp_path / owner_path(bytes(18)) / "7#1").write_bytes(b"half")  # as obstore names what it has begun
    await store.drop(bytes(6))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("url", ["s3://", "az://container", "s3://bucket/a?secret=SECRET"])
def test_a_url_that_nothing_opens_is_one_sentence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    try:
        Objects(url, {"no_such_option": "SECRET"}, 10, "tiers.l4")
    except ConfigError as error:
        told = str(error)
    assert told.startswith("tiers.l4.url: ") and told.endswith(".") and "\n" not in told and "SECRET" not in told


VARIABLES = {
    "s3": {"endpoint": "AWS_ENDPOINT_URL", "region": "AWS_REGION", "access_key_id": "AWS_ACCESS_KEY_ID",
           "secret_access_key": "AWS_SECRET_ACCESS_KEY"},
    "gs": {"base_url": "GOOGLE_BASE_URL", "bearer_token": "GOOGLE_BEARER_TOKEN"},
    "az": {"endpoint": "AZURE_STORAGE_ENDPOINT", "account_name": "AZURE_STORAGE_ACCOUNT_NAME",
           "account_key": "AZURE_STORAGE_ACCOUNT_KEY"},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIABLES)
def test_options_are_the_providers_own_environment_and_ours_over_it(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bucket,) = buckets(request, tmp_path, name)
    for option, value in bucket["options"].items():
        monkeypatch.setenv(VARIABLES[name][option], value)
    Objects(bucket["url"], {}, 10, "tiers.l3").put("a", b"x")
    endpoint = next(iter(bucket["options"]))
    monkeypatch.setenv(VARIABLES[name][endpoint], "http://127.0.0.1:1")
    assert Objects(bucket["url"], {endpoint: bucket["options"][endpoint]}, 10, "tiers.l3").get("a") == b"x"


def test_a_store_that_is_away_is_said_once_and_asked_again_after_a_while(
    s3: S3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 1000.0
    monkeypatch.setattr("proxy.storage.objects.time.monotonic", lambda: now_s)
    url = s3.new_bucket()
    away = Objects(url, {**s3.options, "endpoint": "http://127.0.0.1:1"}, 0.5, "tiers.l4")
    for _ in range(3):
        with pytest.raises(StorageError, match=r"^Cannot read a in s3://.* \(tiers.l4.url\): .*\.$") as told:
            away.get("a")
        assert "\n" not in str(told.value) and s3.options["secret_access_key"] not in str(told.value)
    assert caplog.text.count("until it answers") == 1
    away._store = Objects(url, s3.options, 0.5, "tiers.l4")._store
    with pytest.raises(StorageError):
        away.get("a")
    now_s += 60
    assert away.get("a") is None and away.trouble is None and "answers again" in caplog.text


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot write page_1 in"):
        Objects(str(tmp_path / "file"), {}, 10, "tiers.l3").put("page_1", b"x")
