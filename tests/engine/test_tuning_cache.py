"""The file of tuned launch configurations: several writers, and files that are not what they should be."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.support.world import forks
from tritopt.engine.tuning import cache as tuning_cache
from tritopt.engine.tuning import config
from tritopt.engine.tuning.cache import Entry, Key
from tritopt.engine.tuning.config import Config, Tiles

GPU = "NVIDIA H200 (test)"
ENTRY = Entry(Config(512, 2048, 128, 2), 10.5, Config(), 12.0, "2026-01-01, torch 2.11")


def key(kernel: str = "adamw_update", **fields: Any) -> Key:
    default = Key(kernel, "decoupled", ("plain", "plain"), ("float32",) * 3, 2**20, "3.6.0", "0123456789abcdef")
    return default._replace(**fields)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_cache, "_WARNED", set())
    return tmp_path / "cache"


def file() -> Path:
    path = tuning_cache.path_of(GPU)
    assert path is not None
    return path


def write(text: str | bytes) -> None:
    """Leave this in the file."""
    file().parent.mkdir(exist_ok=True)
    file().write_bytes(text.encode() if isinstance(text, str) else text)


def test_what_is_put_in_is_found_by_the_next_process() -> None:
    tuning_cache.put(GPU, key(), ENTRY)
    assert tuning_cache.read(GPU) == {key(): ENTRY}
    assert tuning_cache.known() == {GPU: {key(): ENTRY}}
    assert [path.name for path in tuning_cache.files()] == ["tuning-NVIDIA-H200-test-.json"]


@pytest.mark.parametrize("field", Key._fields)
def test_every_field_of_the_key_counts(field: str) -> None:
    others: dict[type, Any] = {tuple: ("other",), str: "other", int: 7}
    other = {field: others[type(getattr(key(), field))]}
    tuning_cache.put(GPU, key(), ENTRY)
    assert key(**other) not in tuning_cache.read(GPU)


def test_each_gpu_has_its_own_file() -> None:
    tuning_cache.put(GPU, key(), ENTRY)
    assert key() not in tuning_cache.read("NVIDIA B200")


def test_the_file_is_for_people_too() -> None:
    tuning_cache.put(GPU, key(), ENTRY)
    contents = json.loads(file().read_text())
    assert (contents["version"], contents["gpu"]) == (2, GPU)
    assert "may be deleted" in contents["about"]
    (entry,) = contents["entries"]
    assert entry["kernel"] == "adamw_update"
    assert entry["config"] == {"block_size": 512, "chunk_size": 2048, "tail_size": 128, "num_warps": 2}
    assert len(file().read_text().splitlines()) > 20


def test_the_oldest_go_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_cache, "MAX_ENTRIES", 2)
    for name in ("first", "second", "third"):
        tuning_cache.put(GPU, key(name), ENTRY)
    assert set(tuning_cache.read(GPU)) == {key("second"), key("third")}


def write_twenty(folder: Path, n: int) -> None:
    os.environ["TRITOPT_CACHE_DIR"] = str(folder)
    for i in range(20):
        tuning_cache.put(GPU, key(f"{n}-{i}"), ENTRY)


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    writers = [forks().Process(target=write_twenty, args=(folder, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        tuning_cache.read(GPU)  # never torn: a warning would be an error
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(tuning_cache.read(GPU)) == 60
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock"]


def whole() -> str:
    entry = {**key()._asdict(), **ENTRY._asdict()}
    entry = {name: value._asdict() if isinstance(value, Config) else value for name, value in entry.items()}
    return json.dumps({"version": 2, "gpu": GPU, "entries": [entry]})


UNUSABLE = {
    "empty": "",
    "torn": whole()[:200],
    "binary": b"\x80\xff\x00",
    "deep": "[" * 100_000,
    "list": "[1, 2]",
    "null": "null",
    "other program's": '{"name": "x"}',
    "other version": whole().replace('"version": 2', '"version": 3'),
    "entries of another kind": whole().replace('"entries": [', '"entries": 3, "rest": ['),
    "an entry of another kind": whole().replace('"entries": [', '"entries": [7, '),
    "a list for a name": whole().replace('"adamw_update"', '[["adamw_update"]]'),
    "a driver's configuration of products": whole().replace('"adamw_update"', '"gram"'),
    "an invalid configuration": whole().replace('"num_warps": 2', '"num_warps": 3'),
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=list(UNUSABLE))
def test_a_file_that_cannot_be_used_counts_as_empty(text: str | bytes) -> None:
    write(text)
    with pytest.warns(UserWarning, match=r"tuning-NVIDIA-H200-test-\.json counts as empty .*--clear") as caught:
        assert tuning_cache.read(GPU) == {}
    assert not tuning_cache.read(GPU)  # without another warning
    assert not tuning_cache.known()
    tuning_cache.put(GPU, key(), ENTRY)
    assert tuning_cache.read(GPU) == {key(): ENTRY}
    assert len(caught) == 1


def test_another_gpus_file_is_not_used() -> None:
    write(whole())
    assert tuning_cache.read(GPU) == {key(): ENTRY}
    write(whole().replace("H200", "H100"))
    assert tuning_cache.read(GPU) == {}


INVALID: dict[str, Any] = {
    "block_size": [0, -1024, 1000, 2**20, True, 1024.0, "1024", None],
    "chunk_size": [0, 1000, 1025, 2**24],
    "tail_size": [0, 100, 2048],
    "num_warps": [0, 3, 64, True],
    "programs": [4],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_invalid_configurations(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        config.from_fields({**Config()._asdict(), name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_size", 8), ("block_size", 96), ("block_size", 512), ("block_k", 8), ("block_k", 48), ("group", 0),
     ("num_warps", 3), ("num_stages", 9), ("chunk_size", 128)],
)  # fmt: skip
def test_invalid_tiles(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        config.from_fields({**Tiles()._asdict(), name: value}, Tiles)


def test_tiles_are_kept_too() -> None:
    entry = Entry(Tiles(64, 128), 10.5, Tiles(), 12.0, "2026-01-01, torch 2.11")
    tuning_cache.put(GPU, key("gram"), entry)
    assert tuning_cache.read(GPU) == {key("gram"): entry}


@pytest.mark.parametrize("name", Config._fields)
def test_every_field_must_be_there(name: str) -> None:
    fields = {other: value for other, value in Config()._asdict().items() if other != name}
    with pytest.raises(ValueError, match=r"a launch configuration has block_size, .*, got"):
        config.from_fields(fields)


def test_the_defaults_are_valid() -> None:
    for default in [config.NVIDIA, config.AMD, config.default_of(0)]:
        assert config.from_fields(default._asdict()) == default


def test_a_file_that_cannot_be_read_or_replaced() -> None:
    file().mkdir(parents=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuning_cache.put(GPU, key(), ENTRY)
    empty, unwritten = [str(warning.message) for warning in caught]
    assert "counts as empty" in empty
    assert "cannot be written" in unwritten
    tuning_cache.put(GPU, key(), ENTRY)  # without another warning, which would be an error


def test_a_folder_that_cannot_be_made(folder: Path) -> None:
    folder.write_text("a file, where a folder should be")
    assert tuning_cache.read(GPU) == {}
    with pytest.warns(UserWarning, match="cannot be written .* set TRITOPT_CACHE_DIR to a folder that can") as caught:
        tuning_cache.put(GPU, key(), ENTRY)
    tuning_cache.put(GPU, key("second"), ENTRY)
    assert len(caught) == 1


def test_a_lock_that_is_not_given_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(tuning_cache, "LOCK_SECONDS", 0.05)
    folder.mkdir()
    with FileLock(file().with_suffix(".lock")), pytest.warns(UserWarning, match="lock"):
        tuning_cache.put(GPU, key(), ENTRY)
    assert not file().exists()


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
    with pytest.warns(UserWarning, match="no home directory.*set TRITOPT_CACHE_DIR"):
        tuning_cache.put(GPU, key(), ENTRY)
    assert tuning_cache.read(GPU) == {}
    assert tuning_cache.files() == tuning_cache.clear() == []


def test_clear_takes_the_caches_and_nothing_else(folder: Path) -> None:
    tuning_cache.put(GPU, key(), ENTRY)
    tuning_cache.put("other", key(), ENTRY)
    (folder / "mine.json").write_text("{}")
    assert [path.name for path in tuning_cache.clear()] == ["tuning-NVIDIA-H200-test-.json", "tuning-other.json"]
    assert sorted(path.name for path in folder.glob("*.json")) == ["mine.json"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning_cache.known() == {}
