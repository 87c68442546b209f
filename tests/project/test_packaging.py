"""The package is whole, however it gets installed: DESIGN's mapping, symlink and absent `kernels/__init__.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    "pyproject.toml", "setup.py", "mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "tritopt",
    "kernels", "tests", "benchmarks", "docs", "examples",
}  # fmt: skip
HAS_COMPILER = (
    sys.platform == "linux"
    and shutil.which((os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]) is not None
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
"""Whether a wheel that is built here holds the extension."""


def tracked() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs the git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_top_level_is_as_designed() -> None:
    names = {path.split("/")[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_kernels_is_a_tracked_symlink_and_no_package() -> None:
    link = subprocess.run(
        ["git", "ls-files", "--stage", "tritopt/kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ) if tracked() else None  # fmt: skip
    assert link is not None
    assert link.stdout.startswith("120000")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_is_imported_as_tritopt_kernels_only() -> None:
    wrong = re.compile(r"^\s*(?:import kernels\b|from kernels\b)", re.MULTILINE)
    sources = [p for folder in ("tritopt", "kernels", "tests", "examples") for p in (ROOT / folder).rglob("*.py")]
    assert not [str(path) for path in sources if wrong.search(path.read_text())]


def test_kernels_import_nothing_of_tritopt_but_kernels() -> None:
    upward = re.compile(r"^\s*(?:from|import) tritopt(?!\.kernels\.)", re.MULTILINE)
    assert not [path.name for path in (ROOT / "kernels").rglob("*.py") if upward.search(path.read_text())]


def test_nothing_reads_outside_the_project() -> None:
    outside = re.compile(r"\.\./" + "shared")
    assert not [name for name in tracked() if name.endswith(".py") and outside.search((ROOT / name).read_text())]


def test_files_are_within_their_budgets() -> None:
    def lines(path: Path) -> int:
        return len(path.read_text().splitlines())

    assert lines(ROOT / "kernels" / "drivers" / "multi_tensor_apply.py") <= 250
    long = [p.name for p in (ROOT / "tritopt" / "optimizers").glob("*.py") if lines(p) > 150]
    assert not long, f"optimizers over 150 lines: {long}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", "*.so")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=ignored)
    shutil.copytree(ROOT / "tritopt", folder / "tritopt", ignore=ignored, symlinks=True)
    return folder


def build(source: Path, out: Path, *arguments: str, **environment: str) -> Path:
    """Build an sdist and the wheel out of that sdist, or what --sdist or --wheel asks for."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *arguments, str(source)]
    own = {key: value for key, value in os.environ.items() if key != "TRITOPT_WALK"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**own, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("dist"))


def modules() -> set[str]:
    paths = {f"tritopt/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    own = [path.relative_to(ROOT) for path in (ROOT / "tritopt").rglob("*.py")]
    return paths | {path.as_posix() for path in own if "kernels" not in path.parts} | {"tritopt/engine/walk.c"}


def test_wheel_holds_every_module_and_no_top_level_kernels(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules() | {"tritopt/py.typed"} <= names
    assert not [name for name in names if name.startswith("kernels/")]


def extensions(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler, or no Python.h")
def test_wheel_holds_the_extension_and_fits_this_platform_only(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    assert extensions(wheel) == [f"tritopt/engine/_walk{sysconfig.get_config_var('EXT_SUFFIX')}"]
    assert not wheel.name.endswith("-any.whl")


@pytest.mark.parametrize("environment", [{"CC": "/bin/false"}, {"TRITOPT_WALK": "python"}], ids=str)
def test_without_the_extension_a_wheel_is_whole_and_fits_everywhere(
    environment: dict[str, str], source: Path, tmp_path: Path
) -> None:
    (wheel,) = build(source, tmp_path, "--wheel", **environment).glob("*.whl")
    assert extensions(wheel) == []
    assert wheel.name.endswith("-py3-none-any.whl")
    assert modules() <= set(zipfile.ZipFile(wheel).namelist())


def test_sdist_holds_every_module(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.replace("tritopt/kernels/", "kernels/") for name in (*modules(), "setup.py")} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_wheel_works_away_from_the_checkout(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import sys, pathlib, tritopt, torch; from tritopt.kernels.adam import adam_update;"
        "w = torch.ones(3); tritopt.create('sgd').update([0], [w], [torch.ones(3)], [None]);"
        "print(pathlib.Path(tritopt.__file__).parent.parent, w.tolist());"
        "from tritopt.engine import walk; print(walk.description())"
    )
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(tmp_path)
    assert not HAS_COMPILER or done.stdout.splitlines()[1] == "C, installed"


def test_an_editable_install_has_the_extension_too(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout, symlinks=True)
    # As pip asks for it.
    program = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    extensions = [path.name for path in (checkout / "tritopt" / "engine").glob("_walk*.so")]
    assert extensions == ([f"_walk{sysconfig.get_config_var('EXT_SUFFIX')}"] if HAS_COMPILER else [])
    # What is edited afterwards is built anew when it is needed.
    c_source = checkout / "tritopt" / "engine" / "walk.c"
    c_source.write_text(c_source.read_text() + "/* edited */\n")
    program = "from tritopt.engine import walk; print(walk.description())"
    env = {**os.environ, "PYTHONPATH": str(checkout), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, env=env, capture_output=True, text=True, check=True
    )
    if HAS_COMPILER:
        assert done.stdout.strip() == "C, built by Triton, since what is installed is of another source"


def test_without_triton_only_the_fused_path_is_missing() -> None:
    program = """
import sys
sys.modules["triton"] = None  # `import triton` then raises ImportError, as where it is not installed
import torch, tritopt
w = torch.ones(3, 2)
for name in tritopt.names():
    opt = tritopt.create(name)
    opt.update([0], [w], [torch.ones(3, 2)], [opt.create_state(0, w)])
try:
    tritopt.create("sgd", use_fused_step=True).update([0], [w], [torch.ones(3, 2)], [None])
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'triton" in done.stdout
