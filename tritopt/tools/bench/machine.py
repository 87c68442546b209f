"""The circumstances that numbers belong to: the time, the processor, the driver, the commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import tritopt


def now() -> str:
    """Tell the time, UTC, in seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def cpu_name() -> str:
    """Name the processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver() -> str | None:
    """Tell the version of NVIDIA's driver; None if its tool does not say."""
    return _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def commit() -> str | None:
    """Name the commit of the package's checkout, with a plus if that was changed; None if the package is installed."""
    root = Path(tritopt.__file__).resolve().parent.parent
    if not (root / ".git").exists() or (sha := _said(["git", "rev-parse", "HEAD"], root)) is None:
        return None
    return sha + ("+" if _said(["git", "status", "--porcelain", "--untracked-files=no"], root) else "")


def _said(command: list[str], where: Path | None = None) -> str | None:
    """The first word that a program prints; None if it prints none, or fails."""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
