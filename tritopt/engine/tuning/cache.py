"""The launch configurations that were measured on this machine: one JSON file per GPU name, in the user's cache folder.

Any number of processes may use it: a reader sees a whole file, as writers replace it in one go, and writers take turns.
A file that is torn, another program's, a newer tritopt's or not readable counts as empty, with one warning. None of
this ever fails: what cannot be written is kept in memory.
"""

from __future__ import annotations

import json
import os
import re
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from tritopt.engine.tuning import config
from tritopt.engine.tuning.config import Config
from tritopt.engine.warning import warn

VERSION = 1
MAX_ENTRIES = 5000
"""Of a file; those written first go first."""
LOCK_SECONDS = 10.0
_ABOUT = "tritopt: launch configurations measured on this GPU; may be deleted, `tritopt tune` makes it again"
_PREFIX = "tuning-"


class Key(NamedTuple):
    """What a configuration was measured for, beside the GPU."""

    kernel: str
    """The update function."""
    preamble: str
    formats: tuple[str, ...]
    """Names, of the weight and of each state."""
    dtypes: tuple[str, ...]
    """Of the weight's planes, the gradient and the states' planes."""
    size: str
    """A key of `config.SIZES`."""
    triton: str
    """Version."""
    source: str
    """Hash of the kernel's source: a changed kernel is another one."""


class Entry(NamedTuple):
    """What was found."""

    config: Config
    microseconds: float
    """A launch with it on tensors of the class's size, median."""
    default: Config
    """What was shipped."""
    default_microseconds: float
    measured: str
    """Date, and version of tritopt."""


class _Contents(NamedTuple):
    entries: dict[Key, Entry]
    state: Literal["good", "missing", "torn", "newer", "unreadable"]
    problem: str = ""
    gpu: str = ""


def folder() -> Path | None:
    """Where the files are: TRITOPT_CACHE_DIR, else "tritopt" in the user's cache folder; None without a home."""
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
    return sorted(where.glob(f"{_PREFIX}*.json")) if where is not None else []


def clear() -> list[Path]:
    """Delete the files of all GPUs, and return which they were; OSError if one cannot be deleted."""
    found = files()
    for path in found:
        path.unlink(missing_ok=True)
    return found


class TuningCache:
    """What is known for one GPU. What this process has put in stays, whatever becomes of the file."""

    def __init__(self, gpu: str) -> None:
        where = folder()
        self.gpu = gpu
        self.path = None if where is None else where / f"{_PREFIX}{re.sub(r'[^A-Za-z0-9.]+', '-', gpu)}.json"
        self._own: dict[Key, Entry] = {}

    def entries(self) -> dict[Key, Entry]:
        """All, as the file has them now."""
        return {**self._read().entries, **self._own}

    def get(self, key: Key) -> Entry | None:
        """What was found for it, by this process or as the file has it now."""
        return self._own[key] if key in self._own else self._read().entries.get(key)

    def put(self, key: Key, entry: Entry) -> None:
        """Keep it, here and in the file, beside what others have written there meanwhile."""
        self._own[key] = entry
        if self.path is None:
            _warn_once("no home directory", "tuned launch configurations are not kept: " + _no_folder())
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=LOCK_SECONDS):
                self._write()
        except (OSError, NotImplementedError, Timeout) as error:
            _warn_once(
                self.path,
                f"tuned launch configurations are not kept, as {self.path} cannot be written ({error}): set "
                "TRITOPT_CACHE_DIR to a folder that can, or TRITOPT_AUTOTUNE=0",
            )

    def _write(self) -> None:
        assert self.path is not None
        found = self._read()
        if found.state in ("newer", "unreadable"):
            return
        if found.state == "torn":
            os.replace(self.path, self.path.with_suffix(".broken"))
        entries = list({**found.entries, **self._own}.items())[-MAX_ENTRIES:]
        contents = {
            "about": _ABOUT,
            "version": VERSION,
            "gpu": self.gpu,
            "entries": [_to_json(key, entry) for key, entry in entries],
        }
        # Not tempfile's, which only this user could read: others may share the folder.
        new = self.path.with_suffix(f".{uuid.uuid4().hex}.new")
        try:
            with new.open("x", encoding="utf-8") as file:
                file.write(json.dumps(contents, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path)
        finally:
            new.unlink(missing_ok=True)

    def _read(self) -> _Contents:
        if self.path is None:
            return _Contents({}, "missing")
        found = _parsed(self.path, self.gpu)
        _warn_of(self.path, found)
        return found


def known() -> dict[str, dict[Key, Entry]]:
    """What the files have, by name of the GPU. Of those that cannot be used it warns."""
    found = {}
    for path in files():
        contents = _parsed(path)
        _warn_of(path, contents)
        if contents.state == "good":
            found[contents.gpu] = contents.entries
    return found


def _parsed(path: Path, gpu: str | None = None) -> _Contents:
    """`gpu`: whose it must be; None: anyone's."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return _Contents({}, "missing")
    except OSError as error:
        way_out = "make it readable, or set TRITOPT_CACHE_DIR to another folder"
        return _Contents({}, "unreadable", f"which cannot be read ({error.strerror}): {way_out}")
    delete = "delete it; the next configuration that is tuned moves it aside, to a name ending in .broken"
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError):
        return _Contents({}, "torn", f"which is not whole JSON: {delete}")
    version = contents.get("version") if isinstance(contents, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        upgrade = "upgrade tritopt, or set TRITOPT_CACHE_DIR to another folder"
        return _Contents({}, "newer", f"whose version is {version} and not {VERSION}: {upgrade}")
    found = contents.get("gpu") if isinstance(contents, dict) else None
    if version is True or version != VERSION or not isinstance(found, str) or gpu not in (None, found):
        return _Contents({}, "torn", f"which is not a cache of tritopt for {gpu or 'a GPU'}: {delete}")
    listed = contents.get("entries")
    if not isinstance(listed, list):
        return _Contents({}, "torn", f"which has no list of entries: {delete}")
    return _Contents(dict(_valid(listed)), "good", gpu=found)


def _valid(listed: list[Any]) -> Iterable[tuple[Key, Entry]]:
    """The entries that make sense: a configuration that does not would be launched."""
    for item in listed:
        try:
            yield _from_json(item)
        except (KeyError, TypeError, ValueError):
            continue


def _to_json(key: Key, entry: Entry) -> dict[str, Any]:
    plain = {**key._asdict(), **entry._asdict()}
    return {name: value._asdict() if isinstance(value, Config) else value for name, value in plain.items()}


def _from_json(item: Any) -> tuple[Key, Entry]:
    fields = {name: item[name] for name in (*Key._fields, *Entry._fields)}
    for name in ("formats", "dtypes"):
        fields[name] = tuple(map(_text, fields[name]))
    for name in ("kernel", "preamble", "size", "triton", "source", "measured"):
        _text(fields[name])
    for name in ("config", "default"):
        fields[name] = config.from_fields(fields[name])
    for name in ("microseconds", "default_microseconds"):
        fields[name] = float(fields[name])
    return Key(*[fields[name] for name in Key._fields]), Entry(*[fields[name] for name in Entry._fields])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} must be text")
    return value


def _no_folder() -> str:
    return "there is no home directory; set TRITOPT_CACHE_DIR to a folder"


def _warn_of(path: Path, contents: _Contents) -> None:
    if contents.problem:
        _warn_once(path, f"tritopt does not use {path}, {contents.problem}")


_WARNED: set[Path | str] = set()
_LOCK = threading.Lock()


def _warn_once(about: Path | str, message: str) -> None:
    with _LOCK:
        if about in _WARNED:
            return
        _WARNED.add(about)
    warn(message)
