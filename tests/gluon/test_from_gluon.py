"""The page "From Gluon" tells the truth: each line of its right column runs, one after the other, and its blocks do."""

from __future__ import annotations

import ast
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.world import REASON

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from_gluon.md").read_text()
CODE = re.compile(r"`([^`]+)`")
FIRST, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def lines() -> list[tuple[str, str]]:
    """Left and right code of each row of the tables headed by MXNet and tritopt, in order."""
    pairs = []
    is_in_table = False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.replace(" ", "") == "|MXNet|tritopt|":
            is_in_table = True
        elif not line.startswith("|"):
            is_in_table = False
        elif is_in_table and not line.startswith("|---"):
            left, right = (CODE.fullmatch(cell) for cell in cells)
            assert left is not None, line
            assert right is not None, line
            pairs.append((left[1], right[1]))
    return pairs


@pytest.mark.filterwarnings("ignore:parameter .* has another Trainer:UserWarning")  # the page makes one after the other
def test_every_right_hand_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if REASON:
        pytest.skip(REASON)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(FIRST, "from_gluon.md", "exec"), names)
    try:
        for _, line in lines():
            exec(compile(line, line, "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.params", "trainer.states"]
    assert names["norm"] > 0
    assert names["trainer"].optimizer.num_update == 0
    assert names["net"][0].weight.dtype == torch.float16


def test_the_page_has_both_columns() -> None:
    pairs = lines()
    assert len(pairs) > 40
    for left, right in pairs:
        for code in (left, right):
            ast.parse(code)
        assert "tritopt" not in left
        assert "mxnet" not in right
    said = {right for _, right in pairs}
    for wanted in ("import tritopt as mx", "from tritopt import gluon", "trainer.step(x.shape[0])"):
        assert wanted in said


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_blocks_run(block: str) -> None:
    exec(compile(block, "from_gluon.md", "exec"), {})
