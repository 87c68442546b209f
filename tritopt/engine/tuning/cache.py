"""The launch configurations that were measured on this machine: one JSON file per GPU name, in the user's cache folder.

Any number of processes may use it: a reader sees a whole file, as writers replace it in one go, and writers take turns.
A file that cannot be used counts as empty, one that cannot be written is not, with one warning each.
"""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from tritopt.engine.tuning.config import Config, Tiles, from_fields
from tritopt.engine.warning import warn

VERSION = 2
PRODUCT = "gram"
"""Kernel whose configurations are Tiles; all others have a Config."""
MAX_ENTRIES = 5000
"""Entries of a file; those written first go first."""
LOCK_SECONDS = 10.0
_ABOUT = "tritopt: launch configurations measured on this GPU; may be deleted, `tritopt tune` makes it again"


class Key(NamedTuple):
    """Circumstances that a configuration was measured for, beside the GPU."""

    kernel: str
    """Name of the update function, or PRODUCT."""
    preamble: str
    formats: tuple[str, ...]
    """Names of the formats of the weight and of each state."""
    dtypes: tuple[str, ...]
    """Dtypes of the weight's planes, of the gradient and of the states' planes, in this order."""
    size: int
    """Size of the list in elements, as `config.size_of` has it."""
    triton: str
    """Version of Triton that compiled the kernel."""
    source: str
    """Hash of the kernel's source: a changed kernel is another one."""


class Entry(NamedTuple):
    """Configuration that was measured as the fastest, and its times."""

    config: Config | Tiles
    microseconds: float
    """Median time of a launch with it on tensors of this size, in microseconds."""
    default: Config | Tiles
    default_microseconds: float
    measured: str
    """Date of the measurement, and version of torch."""


def folder() -> Path | None:
    """Folder of the files: TRITOPT_CACHE_DIR, else "tritopt" in the user's cache folder; None without a home."""
    if chosen := os.environ.get("TRITOPT_CACHE_DIR"):
        return Path(os.path.expanduser(chosen))
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "tritopt"
    except RuntimeError:
        return None


def files() -> list[Path]:
    """The files of all GPUs."""
    where = folder()
    return sorted(where.glob("tuning-*.json")) if where is not None else []


def clear() -> list[Path]:
    """Delete the files of all GPUs, and return which they were; OSError if one cannot be deleted."""
    paths = files()
    for path in paths:
        path.unlink(missing_ok=True)
    return paths


def path_of(gpu: str) -> Path | None:
    """The file of a GPU; None without a folder."""
    where = folder()
    return None if where is None else where / f"tuning-{re.sub(r'[^A-Za-z0-9.]+', '-', gpu)}.json"


def read(gpu: str) -> dict[Key, Entry]:
    """Entries for a GPU, as its file has them now."""
    path = path_of(gpu)
    cached_gpu, entries = (gpu, {}) if path is None else _contents(path)
    return entries if cached_gpu == gpu else {}


def known() -> dict[str, dict[Key, Entry]]:
    """Entries of all files, by name of the GPU."""
    return {gpu: entries for gpu, entries in map(_contents, files()) if entries}


def put(gpu: str, key: Key, entry: Entry) -> None:
    """Keep an entry in the GPU's file, beside what others have written there meanwhile."""
    path = path_of(gpu)
    try:
        if path is None:
            raise OSError("there is no home directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
            _write(path, gpu, {**read(gpu), key: entry})
    except (OSError, NotImplementedError, Timeout) as error:
        _warn_once(
            f"tuned launch configurations are not kept, as {path or 'their file'} cannot be written ({error}): set "
            "TRITOPT_CACHE_DIR to a folder that can, or TRITOPT_AUTOTUNE=0"
        )


def _write(path: Path, gpu: str, entries: dict[Key, Entry]) -> None:
    listed = [{**key._asdict(), **as_json(entry)} for key, entry in list(entries.items())[-MAX_ENTRIES:]]
    contents = {"about": _ABOUT, "version": VERSION, "gpu": gpu, "entries": listed}
    new = path.with_suffix(".new")  # whoever writes holds the lock
    new.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def _contents(path: Path) -> tuple[str, dict[Key, Entry]]:
    """Name of the GPU, and the entries; none of a file that cannot be used."""
    try:
        contents = json.loads(path.read_bytes())
        if contents["version"] != VERSION:
            raise ValueError(f"its version is {contents['version']!r:.60}, not {VERSION}")
        return str(contents["gpu"]), dict(map(_from_json, contents["entries"]))
    except (FileNotFoundError, NotADirectoryError):
        return "", {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        _warn_once(
            f"{path} counts as empty ({type(error).__name__}: {error!s:.100}): the next configuration that is tuned "
            "replaces it, `tritopt tune --clear` deletes it"
        )
        return "", {}


def as_json(entry: Entry) -> dict[str, Any]:
    """The fields, with configurations by name."""
    return {**entry._asdict(), "config": entry.config._asdict(), "default": entry.default._asdict()}


def _from_json(item: Any) -> tuple[Key, Entry]:
    fields: list[Any] = [tuple(x) if isinstance(x := item[name], list) else x for name in Key._fields]
    key = Key(*fields)
    hash(key)  # TypeError for anything but text and numbers
    times = float(item["microseconds"]), float(item["default_microseconds"])
    cls = Tiles if key.kernel == PRODUCT else Config
    configs = from_fields(item["config"], cls), from_fields(item["default"], cls)
    return key, Entry(configs[0], times[0], configs[1], times[1], str(item["measured"]))


_WARNED: set[str] = set()
_LOCK = threading.Lock()


def _warn_once(message: str) -> None:
    with _LOCK:
        if message in _WARNED:
            return
        _WARNED.add(message)
    warn(message)
