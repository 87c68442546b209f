"""fp32 masters of fp16 and bf16 parameters: nothing that fp32 keeps is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import tritopt
from tests.support.training import EVERY_CLASS, PRECISIONS, assert_same, everything, parameters, set_grads, train
from tritopt import optim
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.formats.weights import MASTERS

HALF_ULP = 2.0**-9  # of a bf16 number in [1/2, 1)
COMPANIONS = {fmt.companion for fmt in MASTERS.values() if fmt.companion}
LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@LOW
@EVERY_CLASS
def test_is_an_fp32_run_with_rounded_weights(cls: Any, dtype: torch.dtype) -> None:
    """Masters and states bit for bit; the weight is the master to the nearest, after every step, on the kernel."""
    low = parameters(dtype)
    full = [torch.nn.Parameter(p.detach().float()) for p in low]
    opts = [cls(params, lr=0.01, fused=True) for params in (low, full)]
    for step in range(1, 5):
        set_grads(low, step)
        for p, q in zip(low, full, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        for opt in opts:
            opt.step()
        for p, q in zip(low, full, strict=True):
            kept, expected = dict(opts[0].state[p]), opts[1].state[q]
            kept.pop(opts[0].layout_of(p, opts[0].param_groups[0]).format.companion)
            (master,) = [m for other, m in zip(low, opts[0].master_weights(), strict=True) if other is p]
            assert_same([master, *kept.values()], [q.detach(), *expected.values()])
            assert kept.keys() == expected.keys()
            is_tie = (master.view(torch.int32) & 0xFFFF) == 0x8000  # where two are as near, and bf16 goes up
            assert torch.equal(p[~is_tie], master[~is_tie].to(dtype))
    assert all(torch.any(w != p) for w, p in zip(opts[0].master_weights(), parameters(dtype), strict=True))


def test_two_thousand_small_steps_of_adamw() -> None:
    """Each far below a bf16 ulp: together they go where an fp32 run goes, and where torch's goes in fp64."""
    steps, start = 2000, parameters(torch.bfloat16)
    how: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.1}
    low, lost = ([torch.nn.Parameter(p.detach().clone()) for p in start] for _ in range(2))
    full, exact = (
        [torch.nn.Parameter(p.detach().to(dtype)) for p in start] for dtype in (torch.float32, torch.float64)
    )
    opt = optim.AdamW(low, **how, fused=False)
    opts = [
        opt,
        optim.AdamW(lost, **how, fused=False, multi_precision=False),
        optim.AdamW(full, **how, fused=False),
        torch.optim.AdamW(exact, **how, foreach=True),
    ]
    for step in range(1, steps + 1):
        set_grads(low, step)
        for p, *others in zip(low, lost, full, exact, strict=True):
            assert p.grad is not None
            p.grad += 1.0  # a drift, so that the weights move much farther than in a step
            for other in others:
                other.grad = p.grad.to(other.dtype)
        for each in opts:
            each.step()
    for master, p, q, exactly, unmoved, first in zip(opt.master_weights(), low, full, exact, lost, start, strict=True):
        truth = exactly.detach()
        assert torch.equal(master, q)
        assert torch.equal(p, master.bfloat16())
        moved = (truth - first.detach()).abs()
        assert moved.min() > 1e-3
        # Half an ulp for the decay and half an ulp for the step, if all of them went the same way.
        error = (master - truth).abs()
        assert (error <= steps * torch.finfo(torch.float32).eps * truth.abs()).all()
        assert error.max() < 0.05 * moved.min()
        # Without a master such steps are lost wherever they are below half an ulp of the weight.
        large = first.abs() > 0.02
        assert torch.equal(unmoved[large], first[large])


SHRINKS: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW, {"amsgrad": True}),
    (optim.Adam, {"decoupled_weight_decay": True}),
    (optim.NAdam, {"decoupled_weight_decay": True}),
    (optim.RAdam, {"decoupled_weight_decay": True}),
    (optim.Adafactor, {}),
    (optim.SGD, {}),
    (optim.NAG, {"momentum": 0.0}),
    (optim.DCASGD, {"lambd": 0.0}),
    (optim.Lion, {}),
    (optim.Adan, {}),
    (optim.Signum, {"momentum": 0.0}),
]


@pytest.mark.parametrize(("cls", "options"), SHRINKS, ids=lambda x: getattr(x, "__name__", ""))
def test_decay_alone_for_a_thousand_steps(cls: Any, options: dict[str, Any]) -> None:
    """(1 - 1e-4)^1000 = 0.9048, though one step changes no bf16 number."""
    for multi_precision in (True, False):
        p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
        opt = cls([p], lr=1e-3, weight_decay=0.1, fused=False, multi_precision=multi_precision, **options)
        p.grad = torch.zeros_like(p)
        for _ in range(1000 if multi_precision else 100):  # the weight stays, and so does all that a step depends on
            opt.step()
        (master,) = opt.master_weights()
        if multi_precision:
            assert master.dtype == torch.float32
            assert (master - 0.9048).abs().max() < 1e-4
            assert (p - master).abs().max() <= HALF_ULP
        else:
            assert p.eq(1).all()


def test_decay_on_the_kernel_is_that_of_the_reference() -> None:
    runs = []
    for fused in (True, False):
        params = [torch.nn.Parameter(torch.full((3, 2), 0.7, dtype=torch.bfloat16))]
        opt = optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=fused)
        params[0].grad = torch.zeros_like(params[0])
        for _ in range(20):
            opt.step()
        runs.append(everything(opt))
    assert_same(*runs)
    assert torch.any(runs[0][0].float() != runs[0][2 if runs[0][2].shape == (3, 2) else 1])


Write = Callable[[torch.Tensor, torch.Tensor], None]


def _copied(p: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        p.copy_(value)


def _clamped(p: torch.Tensor, value: torch.Tensor) -> None:
    p.data.clamp_(value.min(), value.min())


def _scaled(p: torch.Tensor, value: torch.Tensor) -> None:
    p.data.mul_(0.0).add_(value)


def _by_numpy(p: torch.Tensor, value: torch.Tensor) -> None:
    p.detach().view(torch.int16).numpy()[...] = value.view(torch.int16).numpy()


def _broadcast(p: torch.Tensor, value: torch.Tensor) -> None:
    p.data[...] = value.flatten()[0]


def _by_another_name(p: torch.Tensor, value: torch.Tensor) -> None:
    torch.empty(0, dtype=p.dtype).set_(p.untyped_storage(), 0, p.shape, p.stride()).copy_(value)


def _by_foreach(p: torch.Tensor, value: torch.Tensor) -> None:
    torch._foreach_copy_([p.data], [value])


def _by_a_new_block(p: torch.Tensor, value: torch.Tensor) -> None:
    p.data = value.clone()


def _at_the_same_address(p: torch.Tensor, value: torch.Tensor) -> None:
    """Put a weight where another one was, as an allocator does with weights that come back from the host."""
    block = p.data
    p.data = torch.empty(0, dtype=p.dtype)
    p.data = block.copy_(value)


def _by_a_view(p: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        for row, new in zip(p.view(p.shape), value, strict=True):
            row.fill_(new[0])


WRITES: list[Write] = [
    _copied, _clamped, _scaled, _by_numpy, _broadcast, _by_another_name, _by_foreach, _by_a_new_block,
    _at_the_same_address, _by_a_view,
]  # fmt: skip
KEPT = {
    "auto": 2.0**-8, "fp32": 0.0, "split16": 2.0**-8, "split8": 2.0**-8, "kahan": 2.0**-8, "stochastic": 2.0**-7,
    None: 2.0**-8,
}  # fmt: skip
"""Share of a written bf16 weight that may be left over from another or rounded off, by master: what lies within half an
ulp completes the written weight too, as far as anyone can tell. A whole copy never does."""
WITH_MASTERS = pytest.mark.parametrize(
    ("master", "dtype"),
    [(master, torch.bfloat16) for master in KEPT]
    + [(master, torch.float16) for master in ("auto", "fp32", "kahan", None)],
    ids=lambda x: str(x).removeprefix("torch."),
)
WRITTEN = {1: 7.0, 4: 2.0**-6}
"""Sizes of the weights that are written, by the step after which: larger ones than before after the first, smaller ones
between two that are replayed."""


def is_written(master: str | None, value: torch.Tensor, moved: torch.Tensor, updated: torch.Tensor) -> bool:
    bound = KEPT[master] and KEPT[master] + 2.0**-15
    if value.dtype == torch.float16:
        bound = KEPT["fp32"] if master == "auto" else bound / 8
    return bool(((updated - (value.float() - moved)).abs() <= bound * value).all())


MOVES = [_by_a_new_block]
# Apart, since a weight that moves ends the replay of the whole step: a write in place must be seen by one that goes on.
APART = pytest.mark.parametrize(
    "writes", [[write for write in WRITES if write not in MOVES], MOVES], ids=["in place", "moved"]
)


def allowed(writes: Sequence[Write]) -> list[Write]:
    """Select those that the device allows."""
    return [write for write in writes if write is not _by_numpy or torch.get_default_device().type == "cpu"]


def written(writes: Sequence[Write], params: Sequence[torch.Tensor], number: float) -> list[torch.Tensor]:
    """Write this number into all weights, each in its own way; the weights as they are then."""
    values = [torch.full_like(p, number).detach() for p in params]
    for write, p, value in zip(writes, params, values, strict=True):
        write(p, value)
    return values


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
@WITH_MASTERS
@APART
def test_a_weight_that_is_written_in_any_way_is_the_truth(
    writes: list[Write], master: str | None, dtype: torch.dtype, fused: bool, capturable: bool
) -> None:
    """No version counter moves in some of these ways: the step reads the weight."""
    writes = allowed(writes)
    params = parameters(dtype, ((3, 5),) * len(writes))
    opt = optim.SGD(params, lr=2.0**-10, fused=fused, master=master, capturable=capturable)
    for step in range(6):
        values = written(writes, params, WRITTEN[step]) if step in WRITTEN else []
        set_grads(params, step)
        warm = opt._stepper._last
        opt.step()
        if fused and step > 1:
            assert (opt._stepper._last is warm) == (writes != MOVES or step not in WRITTEN)
        for write, value, p, updated in zip(writes, values, params, opt.master_weights(), strict=False):
            assert p.grad is not None
            assert is_written(master, value, 2.0**-10 * p.grad.float(), updated), write.__name__


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
@WITH_MASTERS
@APART
def test_it_is_the_truth_for_the_other_face(
    writes: list[Write], master: str | None, dtype: torch.dtype, fused: bool
) -> None:
    writes = allowed(writes)
    if master == "auto":
        master = "fp32"  # the default of this face
    weights = [p.detach() for p in parameters(dtype, ((3, 5),) * len(writes))]
    opt = tritopt.create("sgd", learning_rate=2.0**-10, multi_precision=True, master=master, use_fused_step=fused)
    indices, fmt = list(range(len(weights))), MASTERS[master] if master else PLAIN
    states = [opt.create_state_multi_precision(i, p) for i, p in enumerate(weights)]
    for step in range(6):
        values = written(writes, weights, WRITTEN[step]) if step in WRITTEN else []
        grads = [p.detach() for p in parameters(dtype, ((3, 5),) * len(weights), seed=step + 1)]
        opt.update_multi_precision(indices, weights, grads, states)
        for write, value, p, grad, state in zip(writes, values, weights, grads, states, strict=False):
            updated = fmt.decode((p, state[0]) if fmt.companion else (p,), torch.float32)
            assert is_written(master, value, 2.0**-10 * grad.float(), updated), write.__name__


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("master", ["fp32", "kahan"])
@EVERY_CLASS
def test_every_phase_takes_a_weight_that_is_written(cls: Any, master: str, dtype: torch.dtype, fused: bool) -> None:
    """The result is as if the master had been written too; every other element keeps its low bits.

    The new weights are so small that compensations of the old ones are above half an ulp.
    """
    runs = []
    for writes_both in (False, True):
        params = parameters(dtype)
        opt = cls(params, lr=0.01, fused=fused, master=master)
        train(opt, params, range(1, 4))
        for p in params:
            p.data.view(-1)[::2] = 2.0**-20
            if writes_both:
                companion = opt.state[p][MASTERS[master].companion].view(-1)
                companion[::2] = 2.0**-20 if master == "fp32" else 0.0
        train(opt, params, range(4, 6))
        runs.append(everything(opt))
    assert_same(*runs)


def test_a_model_that_is_loaded_takes_its_masters_along() -> None:
    model = torch.nn.Linear(4, 3).bfloat16()
    saved = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    opt = optim.SGD(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    model.load_state_dict(saved)
    opt.step()
    assert_same(opt.master_weights(), [value.float() for value in saved.values()])
    assert_same([p.detach() for p in model.parameters()], list(saved.values()))


def test_master_weights_are_masters_where_there_are_some() -> None:
    """Their order is that of the parameters, over all groups."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16)
    params = [parameters(dtype, ((2, 3),))[0] for dtype in dtypes]
    last: dict[str, Any] = {"params": params[4:], "multi_precision": False}
    opt = optim.AdamW([{"params": params[:3]}, {"params": params[3:4]}, last])
    assert_same(opt.master_weights(), [p.detach() for p in params])
    train(opt, params, range(1, 2))
    masters = opt.master_weights()
    assert [weight.dtype for weight in masters] == [
        torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16,
    ]  # fmt: skip
    for i, (p, weight) in enumerate(zip(params, masters, strict=True)):
        assert opt.state[p].keys() & COMPANIONS == {0: {"master_remainder"}, 2: {"master_param"}}.get(i, set())
        assert (weight.data_ptr() == p.data_ptr()) == (i not in (0, 2))
        assert not weight.requires_grad


@PRECISIONS
@EVERY_CLASS
def test_no_master_where_none_is_wanted_or_needed(cls: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    opt = cls(params, lr=0.01, multi_precision=False)
    train(opt, params, range(1, 2))
    least = torch.promote_types(dtype, cls.rule.least_state_dtype or dtype)
    for p in params:
        assert COMPANIONS.isdisjoint(opt.state[p])
        assert {v.dtype for k, v in opt.state[p].items() if k not in ("step", *cls.rule.scalar_states)} <= {least}
    assert_same(opt.master_weights(), [p.detach() for p in params])


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("after", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("before", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("master", ["auto", "fp32", "kahan"])
def test_a_model_may_change_its_dtype_between_steps(
    master: str, before: torch.dtype, after: torch.dtype, fused: bool | None
) -> None:
    """A master is of a weight of one dtype: beside another the weight is the truth, as the model has it."""
    model = torch.nn.Linear(64, 2).to(before)
    opt = optim.SGD(model.parameters(), lr=0.25, master=master, fused=fused)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.37)
    opt.step()
    model.to(after)
    expected = [p.detach().double() - 0.25 for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    for p, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value.to(after), rtol=torch.finfo(after).eps, atol=1e-6)
    opt.step()


def test_a_master_that_is_none_names_the_way_out() -> None:
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = optim.SGD([param], lr=0.1, master="fp32")
    param.grad = torch.ones_like(param)
    opt.step()
    opt.state[param]["master_param"] = opt.state[param]["master_param"].double()
    with pytest.raises(ValueError, match=r"must be torch\.float32; optimizer\.load_state_dict"):
        opt.step()
