"""README and docs tell the truth: their code runs, their commands parse, and they build as a site."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer.main

from tritopt.commands.app import app
from tritopt.tools.numerics import load, summary

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<marker>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
NEEDS, NOT_RUN, TORCHRUN = "needs: ", "not run: ", "torchrun"
"""Markers of Python blocks: packages without which it is skipped, why it never runs, that torchrun runs it."""


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    marker: str
    language: str
    code: str


def blocks(language: str) -> list[Block]:
    """All blocks in this language."""
    matches = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text())]
    every = [
        Block(page.relative_to(ROOT).as_posix(), m["marker"] or "", m["language"], m["code"]) for page, m in matches
    ]
    return [block for block in every if block.language == language]


PYTHON = [block for block in blocks("python") if "# file:" not in block.code]


@pytest.fixture
def torch_optim_as_it_was() -> Iterator[None]:
    """A block may put a class of tritopt in the place of torch's."""
    before = dict(vars(torch.optim))
    yield
    for name, value in before.items():
        setattr(torch.optim, name, value)


def write_files(page: str, folder: Path) -> list[str]:
    """Write the files that a page shows; returns the optimizers in them, as module:Class."""
    own = []
    for block in blocks("python"):
        if block.page == page and (name := re.match(r"# file: (\w+)\.py", block.code)):
            (folder / f"{name[1]}.py").write_text(block.code)
            own += [f"{name[1]}:{cls}" for cls in re.findall(r"@tritopt\.register\nclass (\w+)", block.code)]
    return own


def in_a_process(code: str, folder: Path, **environment: str) -> None:
    """Run a block like a script; what frameworks warn of is not an error there."""
    (folder / "block.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "block.py"], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}: {block.code.splitlines()[0]}")
@pytest.mark.usefixtures("torch_optim_as_it_was")
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.marker.startswith(NOT_RUN):
        compile(block.code, block.page, "exec")
        pytest.skip(block.marker.removeprefix(NOT_RUN))
    if block.marker.startswith(NEEDS):
        for package in block.marker.removeprefix(NEEDS).split(", "):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs {package}: pip install tritopt[ecosystem]")
        in_a_process(block.code, tmp_path)
    elif block.marker == TORCHRUN:
        if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
            pytest.skip("this torch has no torch.distributed with gloo")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        in_a_process(block.code, tmp_path, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **address)
    elif any(f"import {own.partition(':')[0]}\n" in block.code for own in write_files(block.page, tmp_path)):
        in_a_process(block.code, tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        exec(compile(block.code, block.page, "exec"), {})


def test_markers_are_known() -> None:
    markers = {block.marker for block in PYTHON if block.marker}
    assert {marker for marker in markers if not marker.startswith((NEEDS, NOT_RUN, TORCHRUN))} <= {
        "numbers: from benchmarks/results/numerics_adamw.json"
    }
    assert sum(block.marker.startswith(NOT_RUN) for block in PYTHON) <= 1  # a CUDA graph needs a GPU


def test_own_optimizer_passes_the_check(tmp_path: Path) -> None:
    own = write_files("docs/extending.md", tmp_path)
    assert own == ["my_lion:MyLion", "my_trust:MyTrust"]
    command = [sys.executable, "-m", "tritopt", "check", *own, "--quick"]
    assert any("tritopt check my_lion:MyLion" in bash.code for bash in blocks("bash"))
    env_path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def commands() -> list[str]:
    """Every `tritopt ...` in the pages, in blocks and in lines of text."""
    used: set[str] = set()
    for page in PAGES:
        text = page.read_text()
        used.update(re.findall(r"^tritopt [^#\n]*", "\n".join(m["code"] for m in BLOCK.finditer(text)), re.MULTILINE))
        used.update(re.findall(r"`(tritopt [^`\n]*)`", BLOCK.sub("", text)))
    return sorted(command.partition(" > ")[0].strip() for command in used if "COMMAND" not in command)


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and options exist; nothing is run."""
    monkeypatch.chdir(tmp_path)
    _, name, *arguments = shlex.split(command)
    group = typer.main.get_command(app)
    group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_opens_with_the_two_commands() -> None:
    main, tests = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[:2]
    assert main.endswith("tritopt check")
    assert "pytest" in tests
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()
    assert f"<!-- test command -->\n```bash\n{tests}\n```\n" in README


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", README) + re.findall(r'(?:src|srcset)="([^"]+)"()', README)
    assert len(links) >= 20
    for path, anchor in links:
        assert (ROOT / path).is_file(), path
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_readme_has_the_measured_numbers() -> None:
    measured = summary(load(ROOT / "benchmarks" / "results" / "numerics_adamw.json"))
    (table,) = re.findall(r"<!-- numbers: .*? -->\n\n(.*?)\n\n", README, re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == 5
    for name, *_, kept, moved, drift in rows:
        assert [kept, moved, drift] == [measured[name][i] for i in (0, 1, 8)]


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install tritopt[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path).rglob("hooks.py"))
    page = (tmp_path / "optimizers" / "adamw" / "index.html").read_text()
    assert "tritopt.optim.AdamW" in page
    assert "w_t = w_{t-1} - a_t (m_t / (sqrt(v_t) + epsilon) + wd w_{t-1})" in page
    assert "generated:" not in "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    assert "tritopt.create" in (tmp_path / "llms-full.txt").read_text()
    assert "- [Storage formats]" in (tmp_path / "llms.txt").read_text()
