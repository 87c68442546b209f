"""benchmarks/gpu.sh runs every part, in its time, and says what failed. A stub stands for Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = ("bench", "host", "host-time", "large", "check", "distributed", "tests")
STUB = """#!/usr/bin/env bash
all=$*
printf '%s\\n' "$all" >>{calls}
case "$all" in
  "- "*) exec {python} "$@" ;;
  -) exit 0 ;;
  *"tritopt.names()"*) echo sgd lion ;;
  *"-m tritopt bench"*--save*) while [ "$1" != --save ]; do shift; done; echo '{{}}' >"$2" ;;
  *"-m tritopt check"*) echo '{{"rows": [{{"optimizer": "sgd", "passed": true}}]}}' ;;
esac
case "$all" in {fails}) exit 3 ;; esac
case "$all" in {hangs}) sleep 60 ;; esac
"""

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout", "xargs"))), reason="needs bash and GNU's tools"
)


class Finished:
    """Files and output that a run left behind."""

    def __init__(self, done: subprocess.CompletedProcess[str], out: Path, calls: Path) -> None:
        self.code, self.printed = done.returncode, done.stdout + done.stderr
        self.files = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        self.summary = (out / "summary.txt").read_text() if out.is_dir() else ""
        self.calls = calls.read_text().splitlines() if calls.exists() else []
        self.out = out


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Finished]:
    def run(fails: str = "nothing", hangs: str = "nothing", script: Path = SCRIPT, **environment: str) -> Finished:
        stub, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
        stub.write_text(STUB.format(calls=calls, python=sys.executable, fails=fails, hangs=hangs))
        stub.chmod(0o755)
        clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "TMPDIR")}
        done = subprocess.run(
            ["bash", str(script)],
            env={**clean, "OUT": str(out), "PYTHON": str(stub), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return Finished(done, out, calls)

    return run


def test_it_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("rehearse", ["", "1"])
def test_the_plan_has_every_part_and_fits_in_ten_minutes(run: Callable[..., Finished], rehearse: str) -> None:
    done = run(PLAN="1", REHEARSE=rehearse, WHEELS="wheels")
    assert done.code == 0
    lines = [line for line in done.printed.splitlines() if line]
    assert [line.split()[0] for line in lines] == ["install", *PARTS]
    limits = [int(re.findall(r"(\d+) s", line)[0]) for line in lines if "beside the tests" not in line]
    # A part that is stopped may take 5 seconds more, and what is not a part takes some.
    assert sum(limits) + 5 * len(limits) <= 590
    longest = [int(re.findall(r"(\d+) s", line)[0]) for line in lines if "beside the tests" in line]
    assert max(longest) <= limits[-1]
    assert "--seconds 165" in done.printed
    assert ("--rehearse" in done.printed) == bool(rehearse)
    assert done.files == []


def test_all_parts_run_and_pass(run: Callable[..., Finished]) -> None:
    done = run()
    assert done.code == 0, done.printed
    assert re.findall(r"^(\S+): passed", done.summary, re.MULTILINE) == [
        "bench", "host", "host-time", "large", "tests", "check", "distributed",
    ]  # fmt: skip
    assert done.summary.splitlines()[-1].startswith("all passed")
    assert set(done.files) <= {
        "summary.txt", "bench.json", "bench.png", "bench.svg", "host.json", "check.json", "bench.log", "tests.log",
    }  # fmt: skip
    assert len(done.files) <= 8
    checks = [call for call in done.calls if "tritopt check" in call]
    assert len(checks) == 2
    report = json.loads((done.out / "check.json").read_text())
    assert (report["passed"], len(report["rows"]), report["unfinished"]) == (True, len(checks), [])
    # Nothing runs beside what is measured.
    alone = ["tritopt bench --seconds", "tritopt bench --host", "test_host_time", "test_large.py"]
    places = [next(i for i, call in enumerate(done.calls) if part in call) for part in alone]
    assert places == sorted(places)
    assert max(places) < min(i for i, call in enumerate(done.calls) if "tritopt check" in call)


def test_what_fails_is_named(run: Callable[..., Finished]) -> None:
    done = run(fails="*test_large.py|*--host*", REHEARSE="1")
    assert done.code == 1
    assert "host: FAILED with exit code 3" in done.summary
    assert "large: FAILED with exit code 3" in done.summary
    assert done.summary.splitlines()[-1].startswith("FAILED: host large (see")
    assert done.summary.startswith("A REHEARSAL")


def test_a_red_check_fails(run: Callable[..., Finished]) -> None:
    done = run(fails="*optimizer*lion*", REHEARSE="1")
    assert done.code == 1
    assert "lion: not green" in (done.out / "tests.log").read_text()
    assert done.summary.splitlines()[-1].startswith("FAILED: check (see")


def test_what_takes_too_long_is_stopped(run: Callable[..., Finished], tmp_path: Path) -> None:
    short = tmp_path / "gpu.sh"
    text = SCRIPT.read_text().replace('cd "$(dirname "$0")/.."', f"cd {ROOT}").replace("part host 40", "part host 1")
    short.write_text(text)
    done = run(hangs="*--host*", script=short, REHEARSE="1")
    assert done.code == 1
    assert "host: STOPPED after 1 s" in done.summary
    assert "large: passed" in done.summary


def test_without_a_gpu_the_way_out_is_named(run: Callable[..., Finished]) -> None:
    done = run(fails="*cuda.is_available*")
    assert done.code == 2
    assert "no GPU that torch can use; REHEARSE=1" in done.summary


def test_wheels_never_replace_torch(run: Callable[..., Finished], tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("torch-2.11-cp312.whl", "typer-1-py3.whl", "triton-3.6.whl", "numpy-2.whl", "flashoptim-1-py3.whl"):
        (wheels / name).touch()
    done = run(WHEELS=str(wheels), REHEARSE="1")
    assert done.code == 0, done.printed
    (installed,) = [call for call in done.calls if "pip install" in call]
    assert "--no-index --no-deps" in installed
    assert [Path(word).name for word in installed.split() if word.endswith(".whl")] == [
        "flashoptim-1-py3.whl", "typer-1-py3.whl",
    ]  # fmt: skip
