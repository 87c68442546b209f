"""The table of support is true: a claimed cell takes a step, a denied one raises. tests/distributed has its column."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tritopt
from tests.support.training import options_of
from tritopt import optim
from tritopt.commands.app import app
from tritopt.kernels.formats.weights import MASTERS
from tritopt.mxnet import registry
from tritopt.tools.support import LEGEND, MXNET, TORCH, Support, supported

RECORDS = list(supported())
OF_TORCH = [record for record in RECORDS if record.face == TORCH]
OF_MXNET = [record for record in RECORDS if record.face == MXNET]
EACH_TORCH = pytest.mark.parametrize("record", OF_TORCH, ids=lambda record: record.optimizer)
EACH_MXNET = pytest.mark.parametrize("record", OF_MXNET, ids=lambda record: record.optimizer)
SHAPE = (4, 64)
"""Shape whose rows get scales."""


def parameter(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(0.5, 2, 256).view(SHAPE).to(dtype))


def take_a_step(record: Support, param: torch.nn.Parameter, **options: Any) -> Any:
    """Make a step with a gradient of ones, and see that the weight has moved."""
    cls = getattr(optim, record.optimizer)
    opt = cls([param], **{**options_of(cls), **options})
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    opt.step()
    assert not torch.equal(param, before)
    return opt


def rows_of(gradient: torch.Tensor) -> torch.Tensor:
    """Sparse gradient of rows 1 and 2 alone."""
    rows = torch.tensor([1, 2])
    return torch.sparse_coo_tensor(rows[None], gradient[rows], gradient.shape)


def test_both_faces_are_whole() -> None:
    assert {record.optimizer.lower() for record in OF_TORCH} == set(tritopt.names()) - {"test"}
    assert {record.optimizer for record in OF_MXNET} == set(tritopt.names())


@EACH_TORCH
@pytest.mark.parametrize("master", MASTERS)
def test_masters(master: str, record: Support) -> None:
    if master in record.masters:
        # Updates that stochastic rounding does not lose in all elements.
        take_a_step(record, parameter(torch.bfloat16), master=master, lr=10.0)
    else:
        with pytest.raises(ValueError, match="draw no random bits"):
            take_a_step(record, parameter(torch.bfloat16), master=master)


@EACH_MXNET
@pytest.mark.parametrize("master", MASTERS)
def test_masters_of_mxnet(master: str, record: Support) -> None:
    opt = tritopt.create(record.optimizer, multi_precision=True, master=master, learning_rate=10.0)
    weight = parameter(torch.bfloat16).detach()
    if master in record.masters:
        before = weight.clone()
        opt.update_multi_precision(
            [0], [weight], [torch.ones_like(weight)], [opt.create_state_multi_precision(0, weight)]
        )
        assert not torch.equal(weight, before)
    else:
        with pytest.raises(ValueError, match="draw no random bits"):
            opt.create_state_multi_precision(0, weight)


def states_of(record: Support) -> dict[str, Any]:
    """The dtypes in which the states are stored under state_dtype="int8", by name, under all constructor arguments."""
    are_narrow: dict[str, set[bool]] = {}
    cls = getattr(optim, record.optimizer)
    for variant in cls.rule.variants:
        param = parameter()
        opt = cls([param], **options_of(cls), state_dtype="int8")
        (group,) = opt.param_groups
        for key, targets in opt.arguments.items():
            if isinstance(targets, str) and targets in variant and key != "initial_accumulator_value":
                group[key] = variant[targets]
        param.grad = torch.ones_like(param)
        opt.step()
        for name, value in opt.state[param].items():
            if getattr(value, "ndim", 0) and not name.endswith("_scale"):
                are_narrow.setdefault(name.removesuffix("_int8"), set()).add(name.endswith("_int8"))
    return are_narrow


@EACH_TORCH
def test_states(record: Support) -> None:
    are_narrow = states_of(record)
    assert {name for name, narrow in are_narrow.items() if True in narrow} == set(record.narrow)
    assert {name for name, narrow in are_narrow.items() if False in narrow} == set(record.wide)


@EACH_MXNET
def test_states_of_mxnet(record: Support) -> None:
    cls = registry.find(record.optimizer)
    names = {name for arguments in cls.variants for name in cls(**arguments).state_names}
    assert set(record.narrow) | set(record.wide) == names
    for arguments in cls.variants:
        opt = cls(**arguments, state_dtype="int8")
        formats = dict(zip(opt.state_names, opt.state_formats(), strict=True))
        for name, fmt in formats.items():
            assert name in (record.narrow if fmt.block else record.wide)


@EACH_TORCH
def test_sparse(record: Support) -> None:
    param = parameter()
    opt = getattr(optim, record.optimizer)([param], lr=0.01)
    param.grad = rows_of(torch.ones_like(param))
    if record.sparse == "refused":
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            opt.step()
        return
    assert record.sparse == "dense"
    opt.step()
    dense = parameter()
    opt = getattr(optim, record.optimizer)([dense], lr=0.01)
    dense.grad = rows_of(torch.ones_like(dense)).to_dense()
    opt.step()
    assert torch.equal(param, dense)


@EACH_MXNET
def test_sparse_of_mxnet(record: Support) -> None:
    weight = parameter().detach()
    before, grad = weight.clone(), rows_of(torch.ones_like(weight))
    if record.sparse == "rows":
        opt = tritopt.create(record.optimizer, lazy_update=True, wd=0.1)
    else:
        assert record.sparse == "dense"
        with pytest.raises(TypeError, match="lazy_update"):
            tritopt.create(record.optimizer, lazy_update=True)
        opt = tritopt.create(record.optimizer)
    opt.update([0], [weight], [grad], [opt.create_state(0, weight)])
    moved = (weight != before).any(dim=1)
    assert moved[1:3].all()
    if record.sparse == "rows":  # the decay of the other rows waits
        assert not moved[[0, 3]].any()


@EACH_TORCH
def test_capturable_and_differentiable(record: Support) -> None:
    assert record.capturable == "yes"
    take_a_step(record, parameter(), capturable=True)
    cls = getattr(optim, record.optimizer)
    if record.differentiable == "no":
        with pytest.raises(TypeError, match="differentiable"):
            cls([parameter()], differentiable=True)
        return
    leaf = parameter()
    param = leaf.clone()
    opt = cls([param], **options_of(cls), differentiable=True)
    param.grad = torch.ones_like(param)
    opt.step()
    param.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


@EACH_MXNET
@pytest.mark.parametrize("argument", ["capturable", "differentiable"])
def test_what_mxnet_has_not(argument: str, record: Support) -> None:
    assert getattr(record, argument) == "no"
    with pytest.raises(TypeError, match=argument):
        tritopt.create(record.optimizer, **{argument: True})


@EACH_TORCH
def test_telemetry(record: Support) -> None:
    if record.telemetry == "yes":
        opt = take_a_step(record, parameter(), track=True)
        assert opt.telemetry()[0].update_norm > 0
    else:
        assert record.telemetry == "reference"
        with pytest.raises(ValueError, match="track=True is not for"):
            take_a_step(record, parameter(), track=True)
    reference = take_a_step(record, parameter(), track=True, fused=False)
    assert reference.telemetry()[0].update_norm > 0


@EACH_MXNET
def test_telemetry_of_mxnet(record: Support) -> None:
    weight = parameter().detach()
    opt = tritopt.create(record.optimizer, track=True, learning_rate=0.01)
    lists = ([0], [weight], [torch.ones_like(weight)], [opt.create_state(0, weight)])
    if record.telemetry == "yes":
        opt.update(*lists)
        assert opt.telemetry()[0].update_norm > 0
    else:
        with pytest.raises(ValueError, match="track=True is not for"):
            opt.update(*lists)


def test_every_word_is_explained() -> None:
    for record in RECORDS:
        for column, words in LEGEND.items():
            assert record.cells()[column] in words


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["list", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_command() -> None:
    table = run("--support", "adamw", "lamb")
    assert all(word in table for word in ("AdamW", "LAMB", "sums", "local", "max_exp_avg_sq", "one small vector"))
    assert "Lion" not in table
    records = json.loads(run("--support", "--json"))
    assert [record["optimizer"] for record in records] == [record.optimizer for record in RECORDS]
    header, _, *rows = run("--support", "--markdown", "adafactor").splitlines()[:3]
    assert header.startswith("| face | optimizer | launches | masters |")
    assert "fp32, split16, kahan" in rows[0]
