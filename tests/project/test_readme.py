"""The README tells the truth: its code runs, its commands are the ones that CI and users run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", [b for b in PYTHON if "# file:" not in b], ids=lambda b: b.split("\n")[0])
def test_python_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_own_optimizer_passes_the_check(tmp_path: Path) -> None:
    (block,) = (b for b in PYTHON if "# file: my_lion.py" in b)
    (tmp_path / "my_lion.py").write_text(block)
    command = [sys.executable, "-m", "tritopt", "check", "my_lion:MyLion", "--quick"]
    assert "tritopt check my_lion:MyLion" in README
    env_path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_opens_with_the_two_commands() -> None:
    main, tests = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[:2]
    assert main.endswith("tritopt check")
    assert "pytest" in tests
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()
    assert f"<!-- test command -->\n```bash\n{tests}\n```\n" in README
