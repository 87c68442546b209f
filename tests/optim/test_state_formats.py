"""Formats of states: `state_dtype=` of tritopt.optim."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from tests.support.training import CLASSES, OF_MATRICES, assert_same, everything, options_of, parameters, set_grads
from tritopt import optim
from tritopt.engine.plan import Planner
from tritopt.engine.random_keys import noise_key
from tritopt.engine.state_dtype import stored
from tritopt.engine.tuning.config import Config
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.scales import BLOCK
from tritopt.kernels.formats.states import SIGNED, SQUARES, STATE_FORMATS
from tritopt.kernels.formats.weights import MASTERS
from tritopt.kernels.twins.random import Noise

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((3, 64), (2, 3, 64), (5, 7), (), (0, 64))
FORMATS = {(name, kind): fmt for name, of_kind in STATE_FORMATS.items() for kind, fmt in of_kind.items()}
EVERY_FORMAT = pytest.mark.parametrize("fmt", FORMATS.values(), ids=["-".join(key) for key in FORMATS])
EVERY_NAME = pytest.mark.parametrize("name", STATE_FORMATS)
BY_SUMS = [cls for cls in CLASSES if any(phase.sums_elements for phase in cls.rule().phases)]
# A format knows no class: kernels of those that keep one state of either sign, one of squares, both, and three.
TYPICAL = [optim.SGD, optim.RMSprop, optim.AdamW, optim.Adan]
KERNEL_AND_REFERENCE = pytest.mark.parametrize(
    ("cls", "fused"),
    [
        pytest.param(cls, fused, id=f"{cls.__name__}-{'reference' if fused is False else 'kernel'}")
        for cls in CLASSES
        for fused in (None, False)
        if cls not in BY_SUMS and (fused is False or cls in TYPICAL)
    ],
)
# Bits behind the leading one, at the largest element of a block.
PRECISION = {"bf16": 7, "fp16": 10, "int8": 4, "fp8": 3}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", Config(block_size=64, chunk_size=64, num_warps=1))


def make(cls: Any, params: Any, **options: Any) -> Any:
    momentum = {"momentum": 0.9} if cls in (optim.SGD, optim.RMSprop) else {}
    return cls(params, **options_of(cls, lr=0.01, weight_decay=0.1, **momentum), **options)


def run(cls: Any, params: list[torch.nn.Parameter], steps: range, opt: Any = None, **options: Any) -> Any:
    opt = make(cls, params, **options) if opt is None else opt
    for step in steps:
        set_grads(params, step)
        opt.step()
    return opt


def planes_of(fmt: Format, value: torch.Tensor, step: int = 1) -> tuple[torch.Tensor, ...]:
    planes = stored(fmt, torch.zeros_like(value))
    fmt.encode(planes, value, Noise(noise_key(0, "state"), 0, 0, 0, step, shift=1))
    return planes


@EVERY_FORMAT
def test_rounding_keeps_the_mean(fmt: Format) -> None:
    """Between its two neighbours, with the probabilities that their distances say."""
    generator = torch.Generator("cpu").manual_seed(0)
    value = torch.rand(BLOCK, generator=generator, device="cpu") ** 4 + 1e-3
    value = value if "squares" in fmt.name else value * torch.randn(BLOCK, generator=generator, device="cpu").sign()
    draws = 4000
    decoded = fmt.decode(planes_of(fmt, value.repeat(draws)), F32).view(draws, BLOCK).double()
    low, high = decoded.amin(0), decoded.amax(0)
    assert ((low <= value) & (value <= high)).all()
    assert ((decoded == low) | (decoded == high)).all()
    deviation = (high - low) / 2 / draws**0.5
    assert ((decoded.mean(0) - value).abs() <= 4.5 * deviation + 2.0**-15 * value.abs()).all()


@EVERY_FORMAT
def test_what_is_stored_stays(fmt: Format) -> None:
    """Rounding anew changes nothing, also where the scale of the block does."""
    value = torch.randn(3 * BLOCK, generator=torch.Generator("cpu").manual_seed(1), device="cpu").abs()
    once = fmt.decode(planes_of(fmt, value), F32)
    once[0] = once[:BLOCK].max()
    again = fmt.decode(planes_of(fmt, once, step=2), F32)
    assert torch.equal(again, once)
    if fmt.block:
        assert (planes_of(fmt, value)[1].float().log2() % 1 == 0).all()


@EVERY_FORMAT
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_largest_of_a_block_keeps_its_size(fmt: Format, scale: float) -> None:
    value = scale * torch.linspace(0.5, 1.0, BLOCK, device="cpu")
    decoded = fmt.decode(planes_of(fmt, value), F32)
    bits = PRECISION[fmt.name.split()[0]]
    assert ((decoded - value).abs() <= 2.0**-bits * value).all()


@EVERY_FORMAT
def test_edges(fmt: Format) -> None:
    value = torch.zeros(2 * BLOCK, device="cpu")
    value[0], value[1] = 1.0, 1e-9
    decoded = fmt.decode(planes_of(fmt, value), F32)
    assert (decoded[BLOCK:] == 0).all()
    assert abs(decoded[0] - 1) < 2.0**-5
    assert (decoded[2:BLOCK] == 0).all()
    if "squares" in fmt.name or fmt.name == "bf16":
        assert decoded[1] > 0  # its root divides
    assert fmt.decode(planes_of(fmt, torch.full((BLOCK,), torch.nan, device="cpu")), F32).isnan().all()


HUGE = (1e20, 8e37, 8.3e37, 1.2e38, 2.0**127, 1.8e38, 3e38, torch.finfo(F32).max, torch.inf)


@pytest.mark.parametrize("huge", HUGE)
@EVERY_FORMAT
def test_what_is_too_large_leaves_its_block_finite(fmt: Format, huge: float) -> None:
    """Rounding up does not lead out of fp32 either, at whatever draw, and however often a state is stored again."""
    if not fmt.block:
        return
    value = torch.linspace(0.0, 1.0, BLOCK, device="cpu")
    value[0], value[1] = huge, huge / 3
    for step in range(20):
        value = fmt.decode(planes_of(fmt, value, step), F32)
        assert value.isfinite().all()
        assert value[0] >= min(huge, 2.0**126) * 0.9
    if "squares" not in fmt.name and huge > 1e30:
        assert value[2:].count_nonzero() == 0  # and not 1e30, as a state that is never 0 would be


@EVERY_FORMAT
def test_nan_is_its_own_affair(fmt: Format) -> None:
    value = torch.linspace(0.5, 1.0, BLOCK, device="cpu")
    expected = fmt.decode(planes_of(fmt, value), F32)
    value[3] = torch.nan
    decoded = fmt.decode(planes_of(fmt, value), F32)
    others = torch.arange(BLOCK, device="cpu") != 3
    assert torch.equal(decoded[others], expected[others])
    assert decoded[3].isnan() == (not fmt.block)


@pytest.mark.parametrize("name", ["fp16", "int8", "fp8"])
@KERNEL_AND_REFERENCE
def test_a_gradient_that_is_not_finite_ruins_its_own_weight_alone(cls: Any, fused: bool | None, name: str) -> None:
    """Just as with fp32 states: one in each of three blocks, and none in a fourth."""
    bad, are_finite = torch.tensor([torch.inf, -torch.inf, torch.nan]), []
    for state_dtype in (name, None):
        param = torch.nn.Parameter(torch.ones(4, BLOCK))
        opt = make(cls, [param], state_dtype=state_dtype, fused=fused)
        for step in range(4):
            param.grad = torch.ones_like(param)
            if step == 1:
                param.grad[:3, 0] = bad
            opt.step()
        are_finite.append(param.detach().isfinite())
    assert torch.equal(*are_finite)
    assert are_finite[0][:3, 1:].all()
    assert are_finite[0][3].all()


@pytest.mark.parametrize("name", ["fp16", "int8", "fp8"])
@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("cls", [optim.SGD, optim.Adagrad], ids=["signed", "squares"])
def test_nan_of_either_sign_has_one_code(cls: Any, fused: bool | None, name: str) -> None:
    """0 times infinity is a positive NaN on a GPU, and a negative one on a CPU."""
    param = torch.nn.Parameter(torch.ones(2, BLOCK))
    opt = make(cls, [param], state_dtype=name, fused=fused)
    param.grad = torch.ones_like(param)
    param.grad.view(torch.int32)[:, 0] = torch.tensor([0x7FC00000, -0x400000])
    opt.step()
    planes = [plane for key, plane in opt.state[param].items() if key != "step" and not key.endswith("_scale")]
    assert planes
    for plane in planes:
        assert torch.equal(plane[0, 0], plane[1, 0])


@pytest.mark.parametrize("name", ["fp16", "int8", "fp8"])
@KERNEL_AND_REFERENCE
def test_a_finite_gradient_leaves_its_neighbours_finite(cls: Any, fused: bool | None, name: str) -> None:
    """Optimizers by sums are the exception, where fp32 states give NaN to the whole tensor too."""
    huge, are_finite = torch.tensor(HUGE[:-1]), []
    for state_dtype in (name, None):
        param = torch.nn.Parameter(torch.zeros(len(huge) + 1, BLOCK))
        opt = make(cls, [param], state_dtype=state_dtype, fused=fused)
        for sign in (1, -1, 1, 1):
            param.grad = torch.ones_like(param)
            param.grad[:-1, 0] = sign * huge
            opt.step()
        are_finite.append(param.detach().isfinite())
    assert (are_finite[0] | ~are_finite[1]).all(1).tolist() == [True] * (len(huge) + 1)


@pytest.mark.parametrize("name", ["fp16", "int8", "fp8"])
@pytest.mark.parametrize("block_size", [BLOCK, 8 * BLOCK], ids=["full blocks", "tail"])
@pytest.mark.parametrize("cls", [optim.SGD, optim.Adagrad], ids=["signed", "squares"])
def test_kernel_is_the_reference_at_the_ends_of_fp32(
    cls: Any, name: str, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes and scales, bit for bit. SGD's buffer begins with the gradient, and Adagrad's sum with its square."""
    monkeypatch.setattr(Planner, "config", Config(block_size=block_size, chunk_size=512, num_warps=1))
    tiny = (2.0**-149, 3e-45, 2.0**-126, 1e-38, 1e-25, 1e-23, 3e-20, 1.8e19, 1.9e19)
    grad = torch.zeros(len(HUGE) + len(tiny), BLOCK)
    for row, extreme in zip(grad, (*HUGE, *tiny), strict=True):
        row[:8] = torch.tensor([extreme, -extreme, extreme / 2, -extreme / 3, 1.0, 1e-30, -0.0, 2.0**-149])
    runs = []
    for fused in (None, False):
        param = torch.nn.Parameter(torch.ones_like(grad))
        opt = make(cls, [param], state_dtype=name, fused=fused)
        for scale in (1.0, 0.5, 0.0):  # 0 times infinity is NaN
            param.grad = scale * grad
            opt.step()
        runs.append(everything(opt))
    assert_same(*runs)


def test_fp8_of_either_sign_is_e4m3() -> None:
    codes = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
    finite = (codes & 0x7F) <= 0x78
    fmt = STATE_FORMATS["fp8"][SIGNED]
    decoded = fmt.decode((codes, torch.ones(4, dtype=BF16, device="cpu")), F32)
    assert torch.equal(decoded[finite], codes.view(torch.float8_e4m3fn).float()[finite])


# Each class with one of the formats.
NAMES = tuple(STATE_FORMATS)
CLASS_AND_NAME = [(cls, name) for i, cls in enumerate(CLASSES) for name in (NAMES[i % 4],) if cls not in TYPICAL]


@pytest.mark.parametrize(("cls", "name"), [*CLASS_AND_NAME, *[(cls, name) for cls in TYPICAL for name in NAMES]])
def test_kernel_is_the_reference(cls: Any, name: str) -> None:
    if not all(phase.is_driver for phase in cls.rule().phases):
        master: str | None = "split16"
    else:
        master = {"bf16": "split16", "fp16": "stochastic", "int8": "split8", "fp8": "fp32"}[name]
    shapes = ((3, 64), (5, 7)) if cls in OF_MATRICES else SHAPES
    copies = [parameters(BF16, shapes) for _ in range(2)]
    kernel, reference = (
        run(cls, p, range(3), fused=fused, master=master, state_dtype=name)
        for p, fused in zip(copies, (None, False), strict=True)
    )
    assert len(everything(kernel)) == len(everything(reference))
    if cls in BY_SUMS:
        for a, b in zip(kernel.master_weights(), reference.master_weights(), strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=1e-5)
    else:
        assert_same(everything(kernel), everything(reference))


@EVERY_NAME
@pytest.mark.parametrize("block_size", [BLOCK, 8 * BLOCK], ids=["full blocks", "tail"])
def test_kernel_is_the_reference_at_edges(name: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges are outliers, zeros of either sign, the ends of fp32, and numbers that are not finite."""
    monkeypatch.setattr(Planner, "config", Config(block_size=block_size, chunk_size=512, num_warps=1))
    grad = torch.zeros(6, BLOCK)
    grad[0, :6] = torch.tensor([1e4, 1e-6, -1e-9, -0.0, 1.0, -1.0])
    grad[1] = torch.linspace(-1, 1, BLOCK)
    grad[2] = -torch.linspace(1e-20, 1e-15, BLOCK)
    grad[3] = torch.linspace(1e12, 1e18, BLOCK)
    grad[4, :2] = torch.tensor([torch.inf, 1.0])
    grad[5, :2] = torch.tensor([torch.nan, -1.0])
    runs = []
    for fused in (None, False):
        param = torch.nn.Parameter(torch.ones_like(grad))
        param.grad = grad.clone()
        opt = optim.Adam([param], lr=0.01, state_dtype=name, fused=fused)
        for _ in range(3):
            opt.step()
        state = {key: value for key, value in opt.state[param].items() if key != "step"}
        runs.append((param.detach(), state))
    (weight, state), (expected_weight, expected) = runs
    assert_same([weight], [expected_weight])
    for key, value in expected.items():
        finite = slice(None) if value.is_floating_point() else slice(0, 4 * BLOCK)  # any code, where the scale is NaN
        assert_same([state[key].flatten()[finite]], [value.flatten()[finite]])


@EVERY_NAME
@pytest.mark.parametrize("master", [*MASTERS, None])
def test_every_master_goes_with_every_state(master: str | None, name: str) -> None:
    copies = [parameters(BF16, ((3, 64), (2, 64))) for _ in range(2)]
    kernel, reference = (
        run(optim.AdamW, p, range(2), fused=fused, master=master, state_dtype=name)
        for p, fused in zip(copies, (None, False), strict=True)
    )
    assert_same(everything(kernel), everything(reference))
    assert torch.float32 not in {v.dtype for key, v in kernel.state[copies[0][0]].items() if key.startswith("exp")}


@EVERY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights(dtype: torch.dtype, name: str) -> None:
    copies = [parameters(dtype, ((3, 64), (2, 64))) for _ in range(2)]
    kernel, reference = (
        run(optim.Lion, p, range(2), fused=fused, state_dtype=name)
        for p, fused in zip(copies, (None, False), strict=True)
    )
    assert_same(everything(kernel), everything(reference))


def test_bytes_that_stay() -> None:
    """AdamW with bf16 weights, per parameter, without the gradient."""
    n = 64 * 64
    for master, state_dtype, expected in (
        ("fp32", None, 14),
        ("split16", "bf16", 8),
        ("split16", "fp16", 8 + 4 / 64),
        ("split8", "int8", 5 + 4 / 64),
        ("split8", "fp8", 5 + 4 / 64),
        ("stochastic", "int8", 4 + 4 / 64),
    ):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=BF16))
        opt = run(optim.AdamW, [weight], range(1), fused=False, master=master, state_dtype=state_dtype)
        states = [value for name, value in opt.state[weight].items() if name != "step"]
        assert sum(value.nbytes for value in (weight, *states)) == expected * n


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "unaligned", "strided"])
@EVERY_NAME
def test_layouts(name: str, layout: str) -> None:
    def made() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        tensors = {
            "transposed": lambda: torch.randn(64, 6).t(),
            "channels_last": lambda: torch.randn(3, 16, 2, 2).to(memory_format=torch.channels_last),
            "unaligned": lambda: torch.randn(193)[1:].view(3, 64),
            "strided": lambda: torch.randn(3, 128)[:, ::2],
        }
        return [torch.nn.Parameter(tensors[layout]())]

    kernel, reference = made(), made()
    a, b = (
        run(optim.AdamW, kernel, range(3), state_dtype=name),
        run(optim.AdamW, reference, range(3), state_dtype=name, fused=False),
    )
    assert_same(everything(a), everything(b))


def test_a_weight_that_moves_in_memory_takes_its_states_along() -> None:
    def trained(moved: bool) -> torch.Tensor:
        params = parameters(F32, ((4, 32, 2, 2),))
        opt = run(optim.AdamW, params, range(2), state_dtype={"exp_avg": "int8", "exp_avg_sq": "fp8"})
        if moved:
            params[0].data = params[0].data.to(memory_format=torch.channels_last)
        before = opt.state[params[0]]["exp_avg_int8"].clone()
        run(optim.AdamW, params, range(2, 3), opt)
        assert opt.state[params[0]]["exp_avg_int8"].stride() == params[0].stride()
        assert not torch.equal(before, opt.state[params[0]]["exp_avg_int8"])
        return params[0].detach()

    # The blocks are others, so are the roundings.
    torch.testing.assert_close(trained(True), trained(False), rtol=0.02, atol=0.004)


@pytest.mark.parametrize("new", [*STATE_FORMATS, "fp32", None])
@pytest.mark.parametrize("old", [*STATE_FORMATS, "fp32", None])
@pytest.mark.parametrize("route", ["checkpoint", "group"])
def test_states_change_format(old: str | None, new: str | None, route: str) -> None:
    params = parameters(BF16, ((3, 64), (2, 64)))
    opt = run(optim.AdamW, params, range(3), state_dtype=old, fused=False)
    before = [read(opt, p) for p in params]
    if route == "group":
        opt.param_groups[0].update(state_dtype=new, lr=0.0, betas=(0.999999, 0.999999))
        loaded, other = run(optim.AdamW, params, range(3, 4), opt), params
    else:
        other = [torch.nn.Parameter(p.detach().clone()) for p in params]
        loaded = make(optim.AdamW, other, state_dtype=new, fused=False)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file))
        assert loaded.param_groups[0]["state_dtype"] == new
    for p, (mean, var) in zip(other, before, strict=True):
        decoded = read(loaded, p)
        bits = min([PRECISION.get(str(name), 20) for name in (old, new)])
        exact = old == new and route == "checkpoint"
        for a, b in zip(decoded, (mean, var), strict=True):
            assert torch.equal(a, b) if exact else ((a - b).abs() <= 2.0 ** -(bits - 2) * b.abs().max()).all()
        names = {key for key in loaded.state[p] if key.startswith("exp_avg")}
        assert len(names) == (2 if new in ("bf16", "fp32", None) else 4)
    run(optim.AdamW, other, range(4, 5), loaded)


def read(opt: Any, param: torch.Tensor) -> list[torch.Tensor]:
    """Both moments, in fp32."""
    decoded, state = [], opt.state[param]
    for name, fmt in opt.layout_of(param, opt.param_groups[0]).formats.items():
        keys = [key for key in state if key == name or key.startswith((f"{name}_fp", f"{name}_int8"))]
        decoded.append((PLAIN if len(keys) == 1 else fmt).decode([state[key] for key in sorted(keys, key=len)], F32))
    return decoded


def test_a_checkpoint_of_torch_loads_into_any_format() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 64))
    theirs = torch.optim.AdamW([weight])
    weight.grad = torch.randn_like(weight)
    theirs.step()
    for name, bits in PRECISION.items():
        opt = optim.AdamW([weight], state_dtype=name)
        opt.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for decoded, key in zip(read(opt, weight), ("exp_avg", "exp_avg_sq"), strict=True):
            expected = theirs.state[weight][key]
            assert ((decoded - expected).abs() <= 2.0**-bits * expected.abs().max()).all()


def test_one_format_for_each_state() -> None:
    params = parameters(BF16, ((3, 64),))
    opt = run(optim.AdamW, params, range(2), amsgrad=True, state_dtype={"exp_avg": torch.int8, "exp_avg_sq": "bf16"})
    dtypes = {name: value.dtype for name, value in opt.state[params[0]].items() if name != "step"}
    assert dtypes == {
        "master_remainder": torch.int16,
        "exp_avg_int8": torch.int8,
        "exp_avg_int8_scale": BF16,
        "exp_avg_sq": BF16,
        "max_exp_avg_sq": F32,
    }
    matrix, vector = parameters(BF16, ((3, 64), (2, 64)))
    opt = make(optim.Lion, [{"params": [matrix], "state_dtype": "fp8"}, {"params": [vector]}])
    run(optim.Lion, [matrix, vector], range(1), opt)
    assert set(opt.state[matrix]) == {"step", "master_remainder", "exp_avg_fp8", "exp_avg_fp8_scale"}
    assert set(opt.state[vector]) == {"step", "master_remainder", "exp_avg"}


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="state_dtype='int4' must be one of 'fp32', 'bf16'"):
        make(optim.AdamW, parameters(BF16), state_dtype="int4")
    with pytest.raises(ValueError, match=r"no state 'mean'.* known: 'exp_avg', 'exp_avg_sq'"):
        make(optim.AdamW, parameters(BF16), state_dtype={"mean": "int8"})
    with pytest.raises(ValueError, match="'max_exp_avg_sq' must not be rounded to int8; take 'fp32'"):
        make(optim.AdamW, parameters(BF16), amsgrad=True, state_dtype={"max_exp_avg_sq": "int8"})
    with pytest.raises(ValueError, match="state_dtype='int8' is not for float64 parameters"):
        make(optim.AdamW, parameters(torch.float64), state_dtype="int8")
    opt = run(optim.AdamW, parameters(F32, ((3, 64),)), range(1), state_dtype="int8")
    param = opt.param_groups[0]["params"][0]
    for key, value in (("exp_avg_int8_scale", torch.zeros(2, dtype=BF16)), ("exp_avg_int8", torch.zeros(3, 5).char())):
        state = copy.deepcopy(opt.state_dict())
        state["state"][0][key] = value
        with pytest.raises(ValueError, match=f"{key} of parameter 0 has shape"):
            opt.load_state_dict(state)
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    opt.state[param]["exp_avg_int8_scale"] = torch.zeros(2, dtype=BF16)
    with pytest.raises(ValueError, match="parameter 0: state of shape"):
        opt.step()
    assert torch.equal(param, before)


@EVERY_NAME
def test_training_continues_from_bytes(name: str) -> None:
    def trained(resumed: bool) -> list[torch.Tensor]:
        params = parameters(BF16, ((3, 64), (2, 64)))
        opt = run(optim.AdamW, params, range(2), master="split8", state_dtype=name)
        if resumed:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            opt = make(optim.AdamW, params, master="split8", state_dtype=name)
            opt.load_state_dict(torch.load(file))
        return everything(run(optim.AdamW, params, range(2, 4), opt))

    assert_same(trained(True), trained(False))


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_chunks_and_order_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(order: str, chunk: int, block: int) -> list[torch.Tensor]:
        monkeypatch.setattr(Planner, "config", Config(block_size=block, chunk_size=chunk, num_warps=1))
        params = dict(zip("abc", parameters(BF16, ((5, 64), (3, 64), (7,))), strict=True))
        opt = make(optim.AdamW, [(key, params[key]) for key in order], master="stochastic", state_dtype=name)
        for step in range(3):
            set_grads(list(params.values()), step)
            opt.step()
        return [value for key in "abc" for value in (params[key].detach(), *read(opt, params[key]))]

    expected = trained("abc", 64, 64)
    assert_same(trained("cab", 64, 64), expected)
    assert_same(trained("abc", 128, 64), expected)
    assert_same(trained("bca", 256, 128), expected)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_small_gradients_move_as_far_as_in_fp32(name: str) -> None:
    """A published library's 8-bit updates are four times too long here: its scales are fp16."""
    rms = torch.tensor([1e-6, 1e-7]).view(2, 1, 1)

    def trained(state_dtype: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.nn.Parameter(torch.zeros(2, 16, 64))
        opt = optim.AdamW([weight], lr=1e-3, weight_decay=0, state_dtype=state_dtype, fused=False)
        generator, moved = torch.Generator().manual_seed(0), []
        for step in range(1000):
            before = weight.detach().clone()
            weight.grad = rms * (torch.randn(16, 64, generator=generator) + 0.3)
            opt.step()
            if step % 10 == 0:
                moved.append((weight.detach() - before).double().square().mean((1, 2)))
        return weight.detach().double(), torch.stack(moved).mean(0).sqrt()

    (exact, exact_rms), (stored, stored_rms) = trained(None), trained(name)
    assert ((stored_rms / exact_rms - 1).abs() < 0.05).all()
    assert (((stored * exact).sum((1, 2)) / exact.square().sum((1, 2)) - 1).abs() < 0.05).all()


@EVERY_NAME
def test_second_moments_follow_and_fade(name: str) -> None:
    """A thousandth at a time, which rounding to nearest would not see."""
    fmt, step = STATE_FORMATS[name][SQUARES], 0
    planes = stored(fmt, torch.zeros(2048))  # the mean of as many in fp8 has a standard deviation of 0.8%
    sizes = []
    for size, steps in ((1.0, 300), (0.0, 700)):
        for _ in range(steps):
            step += 1
            value = 0.999 * fmt.decode(planes, F32) + 0.001 * size
            fmt.encode(planes, value, Noise(noise_key(0, "state"), 0, 0, 0, step, shift=1))
        sizes.append(fmt.decode(planes, F32).mean().item())
    risen = 1 - 0.999**300
    assert abs(sizes[0] / risen - 1) < 0.02
    assert abs(sizes[1] / (risen * 0.999**700) - 1) < 0.02


def test_scales_are_for_rows_of_whole_blocks_and_for_long_tensors() -> None:
    """Norms and biases stay fp32, split over processes or not."""
    shapes = ((3, 64), (2, 32, 2), (96,), (3, 65), (2**15 + 13,), (181, 182))
    params = parameters(F32, shapes)
    opt = run(optim.Lion, params, range(2), state_dtype="int8", fused=False)
    assert [("exp_avg_int8" in opt.state[p], "exp_avg" in opt.state[p]) for p in params] == [
        (True, False), (True, False), (False, True), (False, True), (True, False), (True, False)
    ]  # fmt: skip
    assert [tuple(opt.state[params[i]]["exp_avg_int8_scale"].shape) for i in (0, 1, 4)] == [(3, 1), (2, 1), (513,)]
    opt = run(optim.Lion, parameters(F32, shapes), range(1), state_dtype="bf16", fused=False)
    assert all(opt.state[p]["exp_avg"].dtype == BF16 for p in opt.param_groups[0]["params"])


def test_what_stays_fp32() -> None:
    kept = {
        optim.Adamax: {"exp_inf"},
        optim.Ftrl: {"z", "n"},
        optim.FTML: {"d", "z"},
        optim.DCASGD: {"previous_weight"},
        optim.GroupAdaGrad: {"history"},
    }
    for cls, names in kept.items():
        param = parameters(BF16, ((3, 64),))
        opt = run(cls, param, range(1), state_dtype="int8")
        in_fp32 = {key for key, value in opt.state[param[0]].items() if value.dtype == F32 and value.dim()}
        assert in_fp32 == names
    param = parameters(BF16, ((3, 64),))
    opt = run(optim.RMSprop, param, range(1), centered=True, state_dtype="int8")
    assert {"square_avg", "grad_avg", "momentum_buffer_int8"} <= set(opt.state[param[0]])
    assert optim.AdamW.rule().kind_of("var") == SQUARES
