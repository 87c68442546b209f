"""Every optimizer and variant of both faces through Triton's compiler for sm_90, without a GPU: wide, no spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("compiles")  # one worker compiles, once

ARCH = os.environ.get("TRITOPT_TEST_ARCH", "90")  # also "80", "100", "gfx942", on demand
FORMATS = os.environ.get("TRITOPT_TEST_FORMATS", "some")  # "all": every optimizer with every way to keep a master

PROGRAM = """
import json, sys, torch, tritopt, tritopt.optim
arch = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
from tritopt.compiled import compile_launches
from tritopt.kernels.formats import MASTER_FP32, MASTERS, PLAIN
from tritopt.phases import Apply
from tritopt.registry import OPTIMIZERS
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
common = [(bf16, bf16, MASTER_FP32), (f32, f32, PLAIN)]
rare = [(f16, f32, MASTER_FP32), (f32, bf16, PLAIN), (bf16, bf16, PLAIN), (f64, f64, PLAIN)]
packed = [(bf16, bf16, fmt) for fmt in MASTERS.values() if fmt is not MASTER_FP32]
rows = []
rules = {found.rule for found in vars(tritopt.optim).values() if hasattr(found, "rule")}
torchs = {rule.__name__: rule for rule in sorted(rules, key=repr) if rule.__module__.startswith("tritopt.optim.")}
found = {**{name: OPTIMIZERS[name] for name in tritopt.names()}, **torchs}
for name, rule in found.items():
    for variant in rule.variants:
        takes_all = all(isinstance(phase, Apply) for phase in rule(**variant).phases)
        wanted = common + (rare if name in ("adamw", "lamb", "sgd", "adan", "lans") else [])
        wanted += packed if takes_all and (sys.argv[2] == "all" or name in ("adamw", "lion", "signum")) else []
        for weight, grad, fmt in wanted:
            for launch in compile_launches(rule(**variant), weight, grad, fmt, arch):
                rows.append({"case": f"{name} {variant} {weight} {grad} {fmt.name}", **launch._asdict()})
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """In a process of its own: this one interprets kernels."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ARCH, FORMATS], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert not [row for row in rows if row["spilled_bytes"]]


def test_full_blocks_move_128_bits_at_a_time(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["expected_wide_loads"] is None:
            continue
        found = [row["wide_loads"], row["wide_stores"]]
        expected = [row["expected_wide_loads"], row["expected_wide_stores"]]
        if ARCH.startswith("gfx"):  # LLVM unrolls short loops there: each copy has them all
            found = [m if m and n >= m and n % m == 0 else n for n, m in zip(found, expected, strict=True)]
        assert found == expected, row["case"]


def test_rows_move_128_bits_at_a_time(rows: list[dict[str, Any]]) -> None:
    """Eight elements a thread: the gradient in both passes, what holds the weight, and what is written."""
    expected = {
        "bfloat16 torch.bfloat16 fp32 master": (1 + 1 + 2, 1 + 2),
        "float16 torch.float32 fp32 master": (2 + 2 + 2, 1 + 2),
        "float32 torch.float32 plain": (2 + 2 + 2, 2),
        "float32 torch.bfloat16 plain": (1 + 1 + 2, 2),
        "bfloat16 torch.bfloat16 plain": (1 + 1 + 1, 1),
        "float64 torch.float64 plain": (4 + 4 + 4, 4),
    }
    found = [row for row in rows if row["kernel"].startswith("row_")]
    assert found
    for row in found:
        assert (row["wide_loads"], row["wide_stores"]) == expected[row["case"].partition("} torch.")[2]], row["case"]


def test_kernels_say_their_name(rows: list[dict[str, Any]]) -> None:
    names = {
        "multi_tensor_adamw_update",
        "multi_tensor_lamb_moments",
        "sum_partials",
        "multi_tensor_sgd_nesterov_update",
    }
    assert names <= {row["kernel"] for row in rows}
