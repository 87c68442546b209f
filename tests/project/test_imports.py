"""The graph of imports: rooms import one way only, and no files import each other."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = [
    "kernels", "engine", "rule", "lr_scheduler", "mxnet", "optimizers", "optimizer", "gluon", "optim", "tools",
    "commands",
]  # fmt: skip
"""Each may import from itself and from those before it."""
FACES = {"mxnet": "MXNet's", "optimizer": "MXNet's", "gluon": "MXNet's", "optim": "torch's"}
"""Faces do not know of each other."""


def files() -> dict[str, Path]:
    """The package's modules by name, but for the package itself, its names and the command line, which know all."""
    own = [path for path in (ROOT / "tritopt").rglob("*.py") if "kernels" not in path.parts]
    host = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in own}
    device = {
        ".".join(("tritopt", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in (ROOT / "kernels").rglob("*.py")
    }
    every = {name.removesuffix(".__init__"): path for name, path in {**host, **device}.items()}
    return {name: path for name, path in every.items() if name not in ("tritopt", "tritopt.public", "tritopt.__main__")}


def imports() -> dict[str, set[str]]:
    """Modules that each module imports anywhere in it, in its functions and for a type checker alone too."""
    known = files()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    targets |= {full} if full in known else {node.module} & known.keys()
        targets.discard(name)
    return graph


def room(name: str) -> str:
    return name.split(".")[1]


def test_rooms_import_one_way() -> None:
    arrows = {(room(a), room(b), a, b) for a, targets in imports().items() for b in targets}
    assert {a for a, *_ in arrows} <= set(ROOMS)
    upward = [f"{a} imports {b}" for of, to, a, b in arrows if ROOMS.index(of) < ROOMS.index(to)]
    assert not sorted(upward)
    of_faces = [(f"{a} imports {b}", FACES[of], FACES[to]) for of, to, a, b in arrows if {of, to} <= FACES.keys()]
    assert [pair for pair, face, other in of_faces if face != other] == []


def test_no_files_import_each_other() -> None:
    graph = imports()
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, "a circle of imports: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
