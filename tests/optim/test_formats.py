"""Formats by which fp16 and bf16 parameters keep what their own bits cannot hold: `master=`."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.training import (
    OF_MATRICES,
    assert_same,
    everything,
    one_of_each_kind,
    options_of,
    parameters,
    set_grads,
    with_each,
)
from tritopt import Optimizer, optim
from tritopt.engine.driver import Apply
from tritopt.engine.plan import Planner
from tritopt.engine.random_keys import noise_key
from tritopt.engine.tuning.config import Config
from tritopt.kernels.formats.format import Format
from tritopt.kernels.formats.weights import KAHAN, MASTER_FP32, MASTERS, SPLIT8, SPLIT16, STOCHASTIC
from tritopt.kernels.language import triton
from tritopt.kernels.twins.random import Noise

BF16 = torch.bfloat16
SHAPES = ((3, 5), (40,), (2, 3, 2, 2), (), (0,))
CLASSES = [
    cls
    for cls in vars(optim).values()
    if inspect.isclass(cls) and issubclass(cls, optim.Optimizer) and hasattr(cls, "rule")
]
# Where sums are added in another order, a value may round to the neighbour: of 8, 16 or 24 bits.
ROUNDING = {"fp32": 1e-4, "split16": 1e-4, "split8": 1e-4, "kahan": 2e-3, "stochastic": 2**-7}
PAIR = ("fp32", "split16")
PAIRS = [
    (name, dtype) for name, fmt in MASTERS.items() for dtype in (BF16, torch.float16) if dtype in fmt.weight_dtypes
]
PATHS = (None, False)  # kernel, reference
ELEMENTWISE = [
    cls for cls in CLASSES if all(isinstance(phase, Apply) and not phase.sums_elements for phase in cls.rule().phases)
]


class StillScalars(NamedTuple):
    """None that it reads."""

    lr: float


@triton.jit
def still_update(w, g, state, s):  # type: ignore[no-untyped-def]
    """The weight, which is loaded and stored."""
    return w, state


class Still(Optimizer):
    """Optimizer that updates nothing."""

    phases = (Apply(still_update),)
    preamble = "decoupled"

    def scalars(self, lr: float, wd: float, count: int) -> StillScalars:
        return StillScalars(lr)

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Any, s: Any) -> Any:
        return w, state


def from_bits(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def stored(fmt: Format, value: torch.Tensor, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    planes = torch.empty_like(value, dtype=dtype), torch.empty_like(value, dtype=fmt.dtype_of_companion(dtype))
    fmt.encode(planes, value)
    return planes


def make(cls: Any, params: Any, **options: Any) -> Any:
    return cls(params, **options_of(cls, lr=0.01, weight_decay=0.1), **options)


def run(cls: Any, params: list[torch.nn.Parameter], steps: range, opt: Any = None, **options: Any) -> Any:
    opt = make(cls, params, **options) if opt is None else opt
    for step in steps:
        set_grads(params, step)
        opt.step()
    return opt


def test_split_is_the_fp32_number_to_the_last_bit() -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64, device="cpu")
    value = bits.to(torch.int32).view(torch.float32)
    value = value[~value.isnan()]
    weight, remainder = stored(SPLIT16, value)
    value = torch.where(weight.isinf() | (weight == 0), weight.float(), value)  # which are what they are
    assert torch.equal(SPLIT16.decode((weight, remainder), torch.float32).view(torch.int32), value.view(torch.int32))
    tie = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie], value[~tie].bfloat16())


@pytest.mark.parametrize(
    ("bits", "weight"),
    [
        (0x3F808000, 0x3F81),  # a tie goes away from zero, where nearest even would be 0x3F80
        (0xBF808000, 0xBF81),
        (0x3F818000, 0x3F82),
        (0x3F807FFF, 0x3F80),
        (0x7F7F7FFF, 0x7F7F),  # the largest that does not round to infinity
        (0x7F800000, 0x7F80),
        (0x00000001, 0x0000),  # subnormal
        (0x80000000, 0x8000),
    ],
)
def test_split_at_the_edges(bits: int, weight: int) -> None:
    value = from_bits(bits).cpu()
    planes = stored(SPLIT16, value)
    assert int(planes[0].view(torch.int16).item()) & 0xFFFF == weight
    expected = value if weight & 0x7FFF else planes[0].float()  # 0 is 0
    assert torch.equal(SPLIT16.decode(planes, torch.float32).view(torch.int32), expected.view(torch.int32))


FLOATS = (0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3.4e38, 65_519.9, -65_519.9, 6e-8, 1e-45, -1e-40)
STALE: dict[torch.dtype, tuple[float, ...]] = {
    torch.float32: FLOATS,
    torch.bfloat16: FLOATS,
    torch.float16: FLOATS,
    torch.int16: (0, 1, -1, 0x7FFF, -0x7FFF, -0x8000),
    torch.int8: (0, 1, -1, 0x7F, -0x7F, -0x80),
}
BESIDE = [(fmt, dtype) for fmt in MASTERS.values() if fmt.companion for dtype in fmt.weight_dtypes]
WITH_COMPANIONS = pytest.mark.parametrize(
    ("fmt", "dtype"), BESIDE, ids=[f"{fmt.name}, {dtype}".replace("torch.", "") for fmt, dtype in BESIDE]
)


def every_weight(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def stale(fmt: Format, weight: torch.Tensor) -> list[torch.Tensor]:
    """Make planes that may stand beside weights which somebody has written since: numbers of the edge, and other
    weights'."""
    dtype = fmt.dtype_of_companion(weight.dtype)
    generator = torch.Generator(weight.device).manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, weight.shape, generator=generator, device=weight.device)
    assert fmt.companion_of is not None
    other = weight[torch.randperm(len(weight), generator=generator, device=weight.device)]
    near = torch.nextafter(weight.float(), torch.full((), torch.inf))
    return [
        *(torch.full_like(weight, x, dtype=torch.float32).to(dtype) for x in STALE[dtype]),
        bits.to(torch.int32).view(torch.float32).to(dtype) if dtype.is_floating_point else bits.to(dtype),
        fmt.companion_of(other, other.float() * 1.001),
        fmt.companion_of(weight, near),
    ]


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    integer = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    torch.testing.assert_close(a.isnan(), b.isnan(), rtol=0, atol=0)
    torch.testing.assert_close(a[~a.isnan()].view(integer), b[~b.isnan()].view(integer), rtol=0, atol=0)


@WITH_COMPANIONS
def test_every_weight_is_what_its_value_rounds_to(fmt: Format, dtype: torch.dtype) -> None:
    """All 65,536 weights, whoever wrote them, beside whatever was kept of others: to the bit, or NaN and NaN."""
    weight = every_weight(dtype)
    for companion in stale(fmt, weight):
        value = fmt.decode((weight, companion), torch.float32)
        planes = torch.empty_like(weight), torch.empty_like(companion)
        fmt.encode(planes, value, *([Noise(1, 0, 0, 0, 1)] if fmt.draws else []))
        assert_same_bits(planes[0], weight)
        assert_same_bits(fmt.decode(planes, torch.float32), value)
        if fmt is not MASTER_FP32:  # which may be a number that rounds to infinity
            assert_same_bits(value[weight.isinf()], weight[weight.isinf()].float())


@WITH_COMPANIONS
def test_every_weight_is_taken_by_the_kernel_too(fmt: Format, dtype: torch.dtype, monkeypatch: Any) -> None:
    """A step that changes nothing, on all of them: weights stay, what stands beside them is as the reference has it."""
    monkeypatch.setattr(Planner, "config", Config(block_size=2**14, chunk_size=2**16, num_warps=4))
    weight = every_weight(dtype)
    master = next(name for name in MASTERS if MASTERS[name] is fmt)
    companions = stale(fmt, weight)
    at = list(range(len(companions)))
    runs = []
    for fused in (True, False):
        opt = Still(multi_precision=True, master=master, use_fused_step=fused)
        weights, planes = [weight.clone() for _ in at], [companion.clone() for companion in companions]
        opt.update_multi_precision(at, weights, [torch.zeros_like(weight) for _ in at], [(c, None) for c in planes])
        runs.append((weights, planes))
    for i, companion in enumerate(companions):
        expected = fmt.decode((weight, companion), torch.float32)
        for weights, planes in runs:
            assert_same_bits(weights[i], weight)
            assert_same_bits(fmt.decode((weights[i], planes[i]), torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_sums_round_to_the_weight(dtype: torch.dtype) -> None:
    """Just below half an ulp a compensation would be rounded up to that; it is then the next number towards zero."""
    weight = every_weight(dtype)
    weight = weight[weight.isfinite()]
    away = torch.nextafter(weight.float(), weight.float() * 4)
    half = {torch.bfloat16: 2**15, torch.float16: 2**12}[dtype]
    least = torch.finfo(dtype).smallest_normal
    for bits in (half - 1, half - 2, half // 2 + 1, -(half - 1), -(half // 2) - 1, -(half // 2) + 1):
        value = ((weight.float().view(torch.int32)) + bits).view(torch.float32)
        is_here = (value.to(dtype) == weight) & (weight.abs() > least) & away.isfinite()
        assert is_here.sum() > 2**14
        planes = stored(KAHAN, value[is_here], dtype)
        assert torch.equal(planes[0], weight[is_here])
        assert torch.equal((planes[0].float() + planes[1].float()).to(dtype), weight[is_here])
        decoded = KAHAN.decode(planes, torch.float32)
        unit = 2.0**-16 if dtype == torch.bfloat16 else 2.0**-22
        error, subnormal = (decoded - value[is_here]).abs(), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (error <= unit * value[is_here].abs() + subnormal).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
@pytest.mark.parametrize("fmt", [SPLIT16, KAHAN], ids=lambda fmt: fmt.name)
def test_nan_stays_nan(fmt: Format, bits: int) -> None:
    planes = stored(fmt, from_bits(bits))
    assert planes[0].isnan().all()
    assert fmt.decode(planes, torch.float32).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_holds_sixteen_bits(dtype: torch.dtype) -> None:
    value = 1 + torch.rand(10_000)
    decoded = KAHAN.decode(stored(KAHAN, value, dtype), torch.float32)
    mantissa = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    assert (decoded - value).abs().max() <= 2.0 ** -(2 * mantissa)
    infinite = torch.tensor([torch.inf, -torch.inf, 1e38])
    assert torch.equal(KAHAN.decode(stored(KAHAN, infinite, torch.float16), torch.float32)[:2], infinite[:2])


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("cls", ELEMENTWISE, ids=lambda cls: cls.__name__)
def test_split_goes_where_the_fp32_master_goes(cls: Any, fused: bool | None) -> None:
    """Bit for bit, weights at a tie aside: those are equally near."""
    copies = [parameters(BF16, ((3, 5), (40,))) for _ in range(2)]
    whole, split = (
        run(cls, p, range(4), fused=fused, master=m) for p, m in zip(copies, ("fp32", "split16"), strict=True)
    )
    masters = whole.master_weights()
    assert_same(split.master_weights(), masters)
    for weight, other, master in zip(copies[0], copies[1], masters, strict=True):
        tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(weight[~tie], other[~tie])
    for a, b in zip(copies[0], copies[1], strict=True):
        for name in set(whole.state[a]) - {MASTER_FP32.companion}:
            assert torch.equal(whole.state[a][name], split.state[b][name])
        assert split.state[b][SPLIT16.companion].dtype == torch.int16


@pytest.mark.parametrize("cls", one_of_each_kind(ELEMENTWISE), ids=lambda cls: cls.__name__)
def test_split_for_a_thousand_steps(cls: Any) -> None:
    copies = [parameters(BF16, ((8, 16),)) for _ in range(2)]
    whole, split = (
        run(cls, p, range(1000), fused=False, master=m) for p, m in zip(copies, ("fp32", "split16"), strict=True)
    )
    assert_same(split.master_weights(), whole.master_weights())
    (master,) = whole.master_weights()
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(copies[0][0][~tie], copies[1][0][~tie])
    assert master.isfinite().all()


@pytest.mark.parametrize(
    ("cls", "master", "dtype"),
    [
        pytest.param(cls, master, dtype, id=f"{cls.__name__}-{master}-{dtype}".replace("torch.", ""))
        for cls, (master, dtype) in with_each(CLASSES, PAIRS)
    ],
)
def test_kernel_is_the_reference(cls: Any, master: str, dtype: torch.dtype) -> None:
    if MASTERS[master].draws and cls in (optim.Adafactor, optim.GroupAdaGrad):
        pytest.skip("refused, as test_what_does_not_go_together_is_refused shows")
    shapes = ((3, 5), (40, 2)) if cls in OF_MATRICES else SHAPES
    copies = [parameters(dtype, shapes) for _ in range(2)]
    kernel, reference = (
        run(cls, p, range(2), fused=f, master=master) for p, f in zip(copies, (None, False), strict=True)
    )
    if cls in ELEMENTWISE:
        assert_same(everything(kernel), everything(reference))
    for a, b in zip(kernel.master_weights(), reference.master_weights(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=ROUNDING[master], atol=1e-5)


@pytest.mark.parametrize("master", MASTERS)
def test_decay_alone_reaches_its_limit(master: str) -> None:
    """0.9999^1000 is 0.9048; bf16 alone stays at 1."""
    weight = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
    opt = optim.AdamW([weight], lr=1e-3, weight_decay=0.1, master=master, fused=False)
    weight.grad = torch.zeros_like(weight)
    for _ in range(1000):
        opt.step()
    assert abs(opt.master_weights()[0].float().mean().item() - 0.9048) < 2e-3
    # Rounded at random a weight walks; the nearest bf16 number is at most 2^-9 away.
    assert (weight - 0.9048).abs().max() < {"stochastic": 2**-3, "split8": 2**-7}.get(master, 2**-8)


def test_the_default_goes_by_the_dtype() -> None:
    """16 bits beside a bf16 parameter, an fp32 copy beside an fp16 one, and where the step is differentiated."""
    dtypes = (BF16, torch.float16, torch.float32, torch.float64)
    params = [parameters(dtype, ((3, 5),))[0] for dtype in dtypes]
    opt = run(optim.AdamW, params, range(2))
    assert opt.defaults["master"] == opt.param_groups[0]["master"] == "auto"
    companions = {fmt.companion for fmt in MASTERS.values()}
    kept = [opt.state[p].keys() & companions for p in params]
    assert kept == [{"master_remainder"}, {"master_param"}, set(), set()]
    differentiable = optim.AdamW(params[:1], differentiable=True)
    assert differentiable.layout_of(params[0], differentiable.param_groups[0]).format is MASTER_FP32
    old = run(optim.AdamW, parameters(BF16), range(2), master="fp32")
    old.param_groups[0]["master"] = "auto"  # converts
    expected = [master.clone() for master in old.master_weights()]
    old.param_groups[0]["lr"] = 0.0
    run(optim.AdamW, old.param_groups[0]["params"], range(2, 3), old)
    assert_same(old.master_weights(), expected)


def test_bytes_that_stay() -> None:
    """AdamW keeps 14 bytes per parameter beside the gradient with an fp32 master, 12 with 16 bits in its place."""
    for master, expected in (
        ("auto", 12),
        ("fp32", 14),
        ("split16", 12),
        ("kahan", 12),
        ("split8", 11),
        ("stochastic", 10),
        (None, 6),
    ):
        weight = torch.nn.Parameter(torch.ones(1000, dtype=BF16))
        opt = run(optim.AdamW, [weight], range(1), fused=False, master=master)
        states = [value for name, value in opt.state[weight].items() if name != "step"]
        assert sum(value.nbytes for value in (weight, *states)) == expected * 1000


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "unaligned"])
@pytest.mark.parametrize("master", ["split16", "split8", "kahan", "stochastic"])
def test_layouts(master: str, layout: str) -> None:
    def made() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        tensors = {
            "transposed": lambda: torch.randn(6, 4).to(BF16).t(),
            "channels_last": lambda: torch.randn(2, 3, 4, 2).to(BF16).to(memory_format=torch.channels_last),
            "unaligned": lambda: torch.randn(25).to(BF16)[1:],
        }
        return [torch.nn.Parameter(tensors[layout]())]

    kernel, reference = made(), made()
    a, b = (
        run(optim.AdamW, kernel, range(3), master=master),
        run(optim.AdamW, reference, range(3), master=master, fused=False),
    )
    assert_same(everything(a), everything(b))
    if MASTERS[master].companion:
        assert a.state[kernel[0]][MASTERS[master].companion].stride() == kernel[0].stride()


@pytest.mark.parametrize("master", ["split16", "split8", "kahan"])
def test_a_weight_that_is_written_is_taken(master: str) -> None:
    params = parameters(BF16, ((40,),))
    opt = run(optim.AdamW, params, range(2), master=master)
    with torch.no_grad():
        params[0][:20] = 0.0
    before = opt.master_weights()[0].clone()
    params[0].grad = torch.zeros_like(params[0])
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    after = opt.master_weights()[0]
    assert (after[:20].abs() < 1e-30).all()
    assert torch.equal(after[20:], before[20:])  # what split8 holds is not rounded again


@pytest.mark.parametrize("new", [*MASTERS, None])
@pytest.mark.parametrize("old", [*MASTERS, None])
def test_checkpoints_change_format(old: str | None, new: str | None) -> None:
    params = parameters(BF16, ((3, 5), (40,)))
    opt = run(optim.AdamW, params, range(3), master=old)
    other = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = make(optim.AdamW, other, master=new)
    saved = copy.deepcopy(opt.state_dict())
    holds_none = (None, "stochastic")
    if old in holds_none and new not in holds_none:
        with pytest.warns(UserWarning, match="no master"):
            loaded.load_state_dict(saved)
    else:
        loaded.load_state_dict(saved)
    precision = 2.0**-15 if {"kahan", "split8"} & {old, new} else 0.0
    if new in holds_none:
        assert_same([p.detach() for p in params], [p.detach() for p in other])
    else:
        for a, b in zip(opt.master_weights(), loaded.master_weights(), strict=True):
            assert ((a.float() - b).abs() <= precision * b.abs()).all()
    loaded.param_groups[0]["lr"] = 0.0
    before = [master.clone() for master in loaded.master_weights()]
    run(optim.AdamW, other, range(3, 4), loaded)
    names = {name for state in loaded.state.values() for name in state}
    assert names & {fmt.companion for fmt in MASTERS.values()} == ({MASTERS[new].companion} if new else set()) - {""}
    if new not in holds_none:
        for a, b in zip(before, loaded.master_weights(), strict=True):
            assert ((a - b).abs() <= precision * a.abs()).all()


@pytest.mark.parametrize("new", ["auto", "fp32", "split16", "split8", "kahan"])
@pytest.mark.parametrize("old", ["fp32", "split16", "split8", "kahan"])
def test_an_optimizer_may_be_loaded_before_its_model(old: str, new: str) -> None:
    """The checkpoint's master belongs to the checkpoint's weights, which are not there yet."""
    params = parameters(BF16, ((3, 5), (40,)))
    opt = run(optim.AdamW, params, range(3), master=old)
    saved, expected = copy.deepcopy(opt.state_dict()), [master.clone() for master in opt.master_weights()]
    other = parameters(BF16, ((3, 5), (40,)), seed=7)
    loaded = make(optim.AdamW, other, master=new)
    loaded.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(params, other, strict=True):
            q.copy_(p)
    loaded.param_groups[0]["lr"] = 0.0
    run(optim.AdamW, other, range(3, 4), loaded)
    assert_same([q.detach() for q in other], [p.detach() for p in params])
    precision = 2.0**-15 if {"kahan", "split8"} & {old, new} else 0.0
    for a, b in zip(expected, loaded.master_weights(), strict=True):
        assert ((a - b).abs() <= precision * a.abs()).all()
        assert not torch.equal(b, b.bfloat16().float())  # what only a master holds


@pytest.mark.parametrize(("fmt", "bits"), [(SPLIT16, 16), (SPLIT8, 8)], ids=["split16", "split8"])
def test_masters_at_a_tie_keep_all_but_their_last_bit(fmt: Format, bits: int) -> None:
    """The weight of an fp32 master is rounded to even there, up or down; a remainder reaches half an ulp down only."""
    assert fmt.companion_of is not None
    value = from_bits(0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000)
    weight = value.bfloat16()
    decoded = fmt.decode((weight, fmt.companion_of(weight, value)), torch.float32)
    assert torch.equal(decoded.bfloat16().float().sign(), value.sign())
    assert ((decoded - value).abs() <= 2.0 ** -(7 + bits)).all()
    assert torch.equal(decoded[[1, 3]], value[[1, 3]])  # rounded away from zero, which can be said


@pytest.mark.parametrize("new", [*MASTERS, None])
@pytest.mark.parametrize("old", [*MASTERS, None])
def test_a_group_changes_its_master_in_training(old: str | None, new: str | None) -> None:
    params = parameters(BF16, ((3, 5), (40,)))
    opt = run(optim.AdamW, params, range(3), master=old)
    before = [master.clone() for master in opt.master_weights()]
    opt.param_groups[0].update(master=new, lr=0.0)
    run(optim.AdamW, params, range(3, 4), opt)
    names = {name for state in opt.state.values() for name in state}
    assert names & {fmt.companion for fmt in MASTERS.values()} == ({MASTERS[new].companion} if new else set()) - {""}
    precision = 2.0**-8 if new in (None, "stochastic") else 2.0**-15 if {"kahan", "split8"} & {old, new} else 2.0**-23
    for a, b in zip(before, opt.master_weights(), strict=True):
        assert ((a.float() - b.float()).abs() <= precision * a.float().abs()).all()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'fp64' must be one of 'auto', 'fp32', 'split16', .*, or None"):
        make(optim.AdamW, parameters(BF16), master="fp64")
    with pytest.raises(ValueError, match=r"completes bfloat16 parameters, not torch\.float16"):
        make(optim.AdamW, parameters(torch.float16), master="split16")
    for master in ("split16", "split8", "stochastic"):
        with pytest.raises(ValueError, match=f"master='{master}' is not for differentiable=True: .* 'auto', 'fp32'"):
            make(optim.AdamW, parameters(BF16), master=master, differentiable=True)
    opt = make(optim.AdamW, parameters(BF16), master="split16")
    with pytest.raises(ValueError, match="completes bfloat16"):
        opt.add_param_group({"params": parameters(torch.float16)})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": parameters(torch.float16), "master": "kahan"})
    opt.add_param_group({"params": parameters(torch.float32)})
    for cls in (optim.Adafactor, optim.GroupAdaGrad):
        with pytest.raises(ValueError, match="draw no random bits"):
            make(cls, parameters(BF16, ((3, 5),)), master="stochastic")
    with pytest.raises(ValueError, match="rounding_seed=-1"):
        make(optim.AdamW, parameters(BF16), rounding_seed=-1)


@pytest.mark.parametrize("fmt", [SPLIT8, STOCHASTIC], ids=lambda fmt: fmt.name)
def test_rounding_keeps_the_mean(fmt: Format) -> None:
    """Up with the probability that is left out below: within four standard deviations of 65,536 draws."""
    bits = {SPLIT8: 8, STOCHASTIC: 16}[fmt]
    for share in (0.03, 0.5, 0.9):
        value = from_bits(0x3F800000 + int(share * 2**bits)).expand(65_536).clone()
        planes = tuple(torch.empty_like(value, dtype=d) for d in (BF16, fmt.dtype_of_companion(BF16))[: fmt.n_planes])
        fmt.encode(planes, value, Noise(noise_key(0, "weight"), 0, 0, 0, 1))
        decoded = fmt.decode(planes, torch.float32)
        step = 2.0 ** (bits - 23)
        ups = ((decoded - 1) / step).double()
        assert set(ups.unique().tolist()) <= {0.0, 1.0}
        assert abs(ups.mean().item() - share) < 4 * (share * (1 - share) / 65_536) ** 0.5 + 2.0**-bits


@pytest.mark.parametrize("fmt", [SPLIT8, STOCHASTIC], ids=lambda fmt: fmt.name)
def test_rounding_leaves_what_fits_and_what_is_not_finite(fmt: Format) -> None:
    value = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan])
    planes = tuple(torch.empty_like(value, dtype=d) for d in (BF16, fmt.dtype_of_companion(BF16))[: fmt.n_planes])
    fmt.encode(planes, value, Noise(1, 0, 0, 0, 1))
    torch.testing.assert_close(fmt.decode(planes, torch.float32), value, rtol=0, atol=0, equal_nan=True)


def test_bits_are_independent_and_even() -> None:
    draws = [Noise(noise_key(0, name), 0, 0, 0, step).bits16(torch.empty(65_536)) for name in "ab" for step in (1, 2)]
    for bits in draws:
        assert abs(bits.double().mean().item() / 65_535 - 0.5) < 4 / (12 * 65_536) ** 0.5
        assert abs(torch.corrcoef(torch.stack((bits[:-1], bits[1:])).double())[0, 1].item()) < 4 / 256
    assert (torch.corrcoef(torch.stack(draws).double()).fill_diagonal_(0).abs() < 4 / 256).all()


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("master", ["split8", "stochastic"])
def test_bits_go_by_seed_name_and_step_alone(master: str, cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(
        names: str = "abc", chunk: int = 64, seed: int = 0, resumed: bool = False, apart: bool = False
    ) -> list[torch.Tensor]:
        monkeypatch.setattr(Planner, "config", Config(block_size=16, chunk_size=chunk, num_warps=1))

        def build() -> tuple[dict[str, torch.nn.Parameter], Any]:
            params = dict(zip("abc", parameters(BF16, ((40,), (3, 24), (7,))), strict=True))
            named = [(name, params[name]) for name in names]
            groups = [{"params": [pair]} for pair in named] if apart else named
            return params, make(cls, groups, master=master, rounding_seed=seed)

        params, opt = build()
        for step in range(4):
            if resumed and step == 2:
                file = io.BytesIO()
                torch.save((params, opt.state_dict()), file)
                params, opt = build()
                file.seek(0)
                weights, states = torch.load(file)
                with torch.no_grad():
                    for name, param in params.items():
                        param.copy_(weights[name])
                opt.load_state_dict(states)
            set_grads(list(params.values()), step)
            opt.step()
        masters = dict(zip(names, opt.master_weights(), strict=True))
        return [tensor for name in "abc" for tensor in (params[name].detach(), masters[name])]

    expected = trained()
    assert_same(trained("cab"), expected)
    assert_same(trained("bca", apart=True), expected)
    assert_same(trained(chunk=32), expected)
    assert_same(trained(resumed=True), expected)
    assert not torch.equal(trained(seed=1)[3], expected[3])


def test_capturable_draws_the_same() -> None:
    copies = [parameters(BF16, ((40,), (3, 5))) for _ in range(2)]
    runs = [
        run(optim.SGD, p, range(3), master="stochastic", capturable=c)
        for p, c in zip(copies, (False, True), strict=True)
    ]
    assert_same([p.detach() for p in copies[0]], [p.detach() for p in copies[1]])
    assert len(runs) == 2
