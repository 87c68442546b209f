"""The file of tuned launch configurations: several writers, and files that are not what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tritopt.engine.tuning import cache as tuning_cache
from tritopt.engine.tuning import config
from tritopt.engine.tuning.cache import Entry, Key, TuningCache
from tritopt.engine.tuning.config import Config

GPU = "NVIDIA H200 (test)"
ENTRY = Entry(Config(512, 2048, 128, 2), 10.5, Config(), 12.0, "2026-01-01, torch 2.11")


def key(kernel: str = "adamw_update", **fields: Any) -> Key:
    default = Key(kernel, "decoupled", ("plain", "plain"), ("float32",) * 3, "large", "3.6.0", "0123456789abcdef")
    return default._replace(**fields)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_cache, "_WARNED", set())
    return tmp_path / "cache"


def path_of(cache: TuningCache) -> Path:
    assert cache.path is not None
    return cache.path


def written(text: str | bytes, folder: Path) -> TuningCache:
    """A cache whose file has this in it."""
    cache = TuningCache(GPU)
    folder.mkdir(exist_ok=True)
    path_of(cache).write_bytes(text.encode() if isinstance(text, str) else text)
    return cache


def test_what_is_put_in_is_found_by_the_next_process() -> None:
    TuningCache(GPU).put(key(), ENTRY)
    cache = TuningCache(GPU)
    assert cache.get(key()) == ENTRY
    assert cache.entries() == {key(): ENTRY}
    assert tuning_cache.known() == {GPU: {key(): ENTRY}}
    assert [path.name for path in tuning_cache.files()] == ["tuning-NVIDIA-H200-test-.json"]


@pytest.mark.parametrize("field", Key._fields)
def test_every_field_of_the_key_counts(field: str) -> None:
    other: dict[str, Any] = {field: ("other",) if isinstance(getattr(key(), field), tuple) else "other"}
    TuningCache(GPU).put(key(), ENTRY)
    assert TuningCache(GPU).get(key(**other)) is None


def test_each_gpu_has_its_own_file() -> None:
    TuningCache(GPU).put(key(), ENTRY)
    assert TuningCache("NVIDIA B200").get(key()) is None


def test_the_file_is_for_people_too() -> None:
    cache = TuningCache(GPU)
    cache.put(key(), ENTRY)
    contents = json.loads(path_of(cache).read_text())
    assert (contents["version"], contents["gpu"]) == (1, GPU)
    assert "may be deleted" in contents["about"]
    (entry,) = contents["entries"]
    assert entry["kernel"] == "adamw_update"
    assert entry["config"] == {"block_size": 512, "chunk_size": 2048, "tail_size": 128, "num_warps": 2}
    assert len(path_of(cache).read_text().splitlines()) > 20


def test_others_entries_stay() -> None:
    """Two processes that both began with nothing."""
    first, second = TuningCache(GPU), TuningCache(GPU)
    first.put(key("first"), ENTRY)
    second.put(key("second"), ENTRY)
    first.put(key("third"), ENTRY)
    assert set(TuningCache(GPU).entries()) == {key("first"), key("second"), key("third")}


def test_the_oldest_go_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_cache, "MAX_ENTRIES", 2)
    for name in ("first", "second", "third"):
        TuningCache(GPU).put(key(name), ENTRY)
    assert set(TuningCache(GPU).entries()) == {key("second"), key("third")}


WRITER = """
import sys
from tests.engine.test_tuning_cache import ENTRY, GPU, key
from tritopt.engine.tuning.cache import TuningCache
for i in range(20):
    TuningCache(GPU).put(key(f"{sys.argv[1]}-{i}"), ENTRY)
"""


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(n)], env=dict(os.environ)) for n in range(3)]
    while any(writer.poll() is None for writer in writers):
        TuningCache(GPU).entries()  # never torn: a warning would be an error
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(TuningCache(GPU).entries()) == 60
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock"]


def whole() -> str:
    entry = {**key()._asdict(), **ENTRY._asdict()}
    entry = {name: value._asdict() if isinstance(value, Config) else value for name, value in entry.items()}
    return json.dumps({"version": 1, "gpu": GPU, "entries": [entry]})


NOT_OURS = {
    "empty": "",
    "torn": whole()[:200],
    "binary": b"\x80\xff\x00",
    "deep": "[" * 100_000,
    "list": "[1, 2]",
    "null": "null",
    "other program's": '{"name": "x"}',
    "other GPU's": whole().replace("H200", "H100"),
    "no version": whole().replace('"version"', '"was"'),
    "version true": whole().replace('"version": 1', '"version": true'),
    "entries of another kind": whole().replace('"entries": [', '"entries": 3, "rest": ['),
}


@pytest.mark.parametrize("text", NOT_OURS.values(), ids=list(NOT_OURS))
def test_torn_and_foreign_files_are_moved_aside(text: str | bytes, folder: Path) -> None:
    cache = written(text, folder)
    with pytest.warns(UserWarning, match=r"tuning-NVIDIA-H200-test-\.json, which .*delete it") as caught:
        assert cache.get(key()) is None
    assert len(caught) == 1
    assert cache.get(key()) is None  # without another warning
    cache.put(key(), ENTRY)
    assert TuningCache(GPU).entries() == {key(): ENTRY}
    raw = text.encode() if isinstance(text, str) else text
    assert path_of(cache).with_suffix(".broken").read_bytes() == raw


def test_the_whole_file_of_these_tests_is_good(folder: Path) -> None:
    assert written(whole(), folder).get(key()) == ENTRY


def test_a_newer_versions_file_is_left_alone(folder: Path) -> None:
    text = whole().replace('"version": 1', '"version": 2')
    cache = written(text, folder)
    with pytest.warns(UserWarning, match="version is 2 and not 1: upgrade tritopt"):
        cache.put(key(), ENTRY)
    assert cache.get(key()) == ENTRY
    assert path_of(cache).read_text() == text


INVALID: dict[str, Any] = {
    "block_size": [0, -1024, 1000, 2**20, True, 1024.0, "1024", None],
    "chunk_size": [0, 1000, 1025, 2**24],
    "tail_size": [0, 100, 2048],
    "num_warps": [0, 3, 64, True],
    "programs": [4],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_invalid_configurations_are_not_taken(name: str, value: Any, folder: Path) -> None:
    contents = json.loads(whole())
    good = json.loads(whole().replace("adamw_update", "other"))["entries"][0]
    contents["entries"][0]["config"] = {**Config()._asdict(), name: value}
    cache = written(json.dumps({**contents, "entries": [*contents["entries"], 7, None, {}, good]}), folder)
    assert cache.entries() == {key("other"): ENTRY}
    with pytest.raises(ValueError, match=name):
        config.from_fields({**Config()._asdict(), name: value})


@pytest.mark.parametrize("name", Config._fields[:4])
def test_every_field_must_be_there(name: str) -> None:
    fields = {other: value for other, value in Config()._asdict().items() if other != name}
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        config.from_fields(fields)


def test_what_is_shipped_is_valid() -> None:
    every = [shipped.config for table in config.SHIPPED.values() for shipped in table.values()]
    for found in [*every, config.NVIDIA, config.AMD]:
        assert config.from_fields(found._asdict()) == found


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read and write everything")
def test_permissions(folder: Path) -> None:
    cache = written(whole(), folder)
    path_of(cache).chmod(0)
    with pytest.warns(UserWarning, match="cannot be read .*: make it readable"):
        cache.put(key(), ENTRY)
    assert cache.get(key()) == ENTRY


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    cache = TuningCache(GPU)
    path_of(cache).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read .*: make it readable, or set TRITOPT_CACHE_DIR"):
        cache.put(key(), ENTRY)
    assert cache.get(key()) == ENTRY
    assert path_of(cache).is_dir()


def test_a_folder_that_cannot_be_made(folder: Path) -> None:
    folder.write_text("a file, where a folder should be")
    cache = TuningCache(GPU)
    assert cache.get(key()) is None
    with pytest.warns(UserWarning, match="cannot be written .* set TRITOPT_CACHE_DIR to a folder that can") as caught:
        cache.put(key(), ENTRY)
    cache.put(key("second"), ENTRY)  # without another warning, which would be an error
    assert len(caught) == 1
    assert cache.entries() == {key(): ENTRY, key("second"): ENTRY}


def test_a_lock_that_is_not_given_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(tuning_cache, "LOCK_SECONDS", 0.05)
    cache = TuningCache(GPU)
    folder.mkdir()
    with FileLock(path_of(cache).with_suffix(".lock")), pytest.warns(UserWarning, match="lock"):
        cache.put(key(), ENTRY)
    assert cache.get(key()) == ENTRY
    assert not path_of(cache).exists()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRITOPT_CACHE_DIR", "~/mine")
    assert tuning_cache.folder() == tmp_path / "mine"
    monkeypatch.delenv("TRITOPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert tuning_cache.folder() == Path("/xdg/tritopt")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert tuning_cache.folder() == tmp_path / ".cache/tritopt"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TRITOPT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    cache = TuningCache(GPU)
    with pytest.warns(UserWarning, match="no home directory; set TRITOPT_CACHE_DIR"):
        cache.put(key(), ENTRY)
    assert cache.get(key()) == ENTRY
    assert tuning_cache.files() == tuning_cache.clear() == []


def test_clear_takes_the_caches_and_nothing_else(folder: Path) -> None:
    TuningCache(GPU).put(key(), ENTRY)
    TuningCache("other").put(key(), ENTRY)
    (folder / "mine.json").write_text("{}")
    assert [path.name for path in tuning_cache.clear()] == ["tuning-NVIDIA-H200-test-.json", "tuning-other.json"]
    assert sorted(path.name for path in folder.glob("*.json")) == ["mine.json"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning_cache.known() == {}
