"""`master=` of tritopt.Optimizer: every way to keep a master, through lists, Updater, sparse gradients and errors."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

import tritopt
from tests.support.training import one_of_each_kind, with_each
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import Config
from tritopt.kernels.formats.weights import MASTERS
from tritopt.mxnet.registry import registered

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
COMPANIONS = {"fp32": F32, "split16": torch.int16, "split8": torch.int8, "kahan": BF16}
OTHERS = [name for name in MASTERS if name != "fp32"]
SHIPPED = [name for name in tritopt.names() if registered()[name].__module__.startswith("tritopt.")]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", Config(block_size=16, chunk_size=48, num_warps=1))


def random(seed: int, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)


def draws_where_it_cannot(opt: tritopt.Optimizer, master: str) -> bool:
    return MASTERS[master].draws and not all(phase.is_driver for phase in opt.phases)


def sums(opt: tritopt.Optimizer) -> bool:
    return any(phase.sums_elements for phase in opt.phases)


class Run:
    """A matrix, a long vector (both bf16) and an fp32 matrix, trained on the same gradients whatever the format."""

    def __init__(self, opt: tritopt.Optimizer) -> None:
        self.opt = opt
        self.weights = [random(0, 5, 6), random(1, 100, 1), random(2, 3, 2, dtype=F32)]
        self.states = [opt.create_state_multi_precision(i, w) for i, w in enumerate(self.weights)]

    def step(self, seed: int) -> None:
        grads = [random(100 * seed + i, *w.shape, dtype=w.dtype) for i, w in enumerate(self.weights)]
        self.opt.update_multi_precision([0, 1, 2], self.weights, grads, self.states)

    def masters(self) -> list[torch.Tensor]:
        assert self.opt.master is not None
        fmt = MASTERS[self.opt.master]
        pairs = list(zip(self.weights, self.states, strict=True))[:2]
        return [fmt.decode((w, s[0]) if fmt.companion else (w,), F32).clone() for w, s in pairs]

    def tensors(self) -> list[torch.Tensor]:
        return [*self.weights, *flatten(self.states)]


def flatten(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for item in state for t in flatten(item)] if isinstance(state, list | tuple) else []


def create(name: str, master: str | None, **options: Any) -> tritopt.Optimizer:
    decay = {"wd": 0.05} if registered()[name].decays else {}
    return tritopt.create(
        name, **{"learning_rate": 0.05, "multi_precision": True, "master": master, **decay, **options}
    )


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", one_of_each_kind(SHIPPED, tritopt.create))
def test_split16_goes_where_the_fp32_master_goes(name: str) -> None:
    """Masters and states bit for bit, in the kernel and in the reference; weights too, but for ties."""
    for fused in (None, False):
        whole, split = (Run(create(name, master, use_fused_step=fused)) for master in ("fp32", "split16"))
        for seed in range(3):
            whole.step(seed)
            split.step(seed)
        assert_same(split.masters(), whole.masters())
        assert_same(flatten([s[1] for s in split.states[:2]]), flatten([s[1] for s in whole.states[:2]]))
        for a, b, master in zip(split.weights, whole.weights, whole.masters(), strict=False):
            tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
            assert torch.equal(a[~tie], b[~tie])


@pytest.mark.parametrize(("name", "master"), with_each(SHIPPED, OTHERS, tritopt.create))
def test_kernel_is_the_reference_in_every_plane(name: str, master: str) -> None:
    opt = create(name, master, use_fused_step=True)
    if draws_where_it_cannot(opt, master):
        with pytest.raises(ValueError, match=r"parameter 0: master=.* draw no random bits: take 'fp32'"):
            Run(opt)
        return
    if sums(opt):
        return  # in another order; `tritopt check` compares these
    kernel, reference = Run(opt), Run(create(name, master, use_fused_step=False))
    for seed in range(2):
        kernel.step(seed)
        reference.step(seed)
    assert_same(kernel.tensors(), reference.tensors())


@pytest.mark.parametrize("master", [*MASTERS, None])
def test_what_a_state_is(master: str | None) -> None:
    opt = create("adam", master)
    weight = random(0, 4, 3).t()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = opt.create_state_multi_precision(0, weight)
    if master in COMPANIONS:
        companion, state = state
        assert (companion.dtype, companion.shape) == (COMPANIONS[master], weight.shape)
        assert companion.stride() == weight.stride()
        assert torch.equal(MASTERS[master].decode((weight, companion), F32), weight.float())
    assert [value.dtype for value in state] == [BF16 if master is None else F32] * 2
    assert len(opt.create_state_multi_precision(1, weight.float())) == 2


@pytest.mark.parametrize("master", [*MASTERS, None])
def test_small_updates_move_weights_in_the_mean(master: str | None) -> None:
    """1000 steps of 2^-13 from 1: bf16 alone does not leave 1."""
    opt = tritopt.create("sgd", learning_rate=2.0**-13, multi_precision=True, master=master, use_fused_step=False)
    weight = torch.ones(1024, dtype=BF16)
    state = opt.create_state_multi_precision(0, weight)
    for _ in range(1000):
        opt.update_multi_precision(0, weight, torch.ones(1024, dtype=BF16), state)
    moved = 1 - weight.float().mean().item()
    assert moved == 0 if master is None else abs(moved - 1000 / 2**13) < 2**-8


@pytest.mark.parametrize("dump_optimizer", [False, True])
@pytest.mark.parametrize("master", MASTERS)
def test_training_continues_from_bytes(master: str, dump_optimizer: bool) -> None:
    def updater_of() -> tritopt.Updater:
        return tritopt.get_updater(create("adam", master, rounding_seed=3))

    weights = [random(0, 5, 6), random(1, 40)]
    grads = [[random(10 + 2 * step + i, *w.shape) for i, w in enumerate(weights)] for step in range(4)]
    updater = updater_of()
    for step in range(2):
        updater([0, 1], grads[step], weights)
    resumed_weights = [w.clone() for w in weights]
    resumed = tritopt.get_updater(tritopt.create("sgd")) if dump_optimizer else updater_of()
    resumed.set_states(updater.get_states(dump_optimizer))
    if not dump_optimizer:
        resumed.optimizer._update_count([0, 1])
        resumed.optimizer._update_count([0, 1])
    assert (resumed.optimizer.master, resumed.optimizer.rounding_seed) == (master, 3)
    for step in range(2, 4):
        updater([0, 1], grads[step], weights)
        resumed([0, 1], grads[step], resumed_weights)
    assert_same(weights, resumed_weights)
    assert_same(flatten(list(updater.states.values())), flatten(list(resumed.states.values())))
    assert copy.deepcopy(resumed.optimizer).master == pickle.loads(pickle.dumps(resumed.optimizer)).master == master


@pytest.mark.parametrize("new", MASTERS)
@pytest.mark.parametrize("old", COMPANIONS)
def test_an_updater_takes_states_of_another_master(old: str, new: str) -> None:
    weight = random(0, 40)
    updater = tritopt.get_updater(create("adam", old))
    for step in range(2):
        updater("w", random(10 + step, 40), weight)
    companion, inner = updater.states["w"]
    before = MASTERS[old].decode((weight, companion), F32)
    moved = tritopt.get_updater(create("adam", new, learning_rate=0.0, wd=0.0))
    moved.set_states(updater.get_states())
    moved.optimizer.rescale_grad = float("nan")  # converts and skips
    moved("w", random(20, 40), weight)
    state = moved.states["w"]
    if new == "stochastic":
        return assert_same(list(state), list(inner))
    assert_same(list(state[1]), list(inner))
    after = MASTERS[new].decode((weight, state[0]), F32)
    units = {"fp32": 0.0, "split16": 0.0, "kahan": 2.0**-17, "split8": 2.0**-15}[new]
    tie = (before.view(torch.int32) & 0xFFFF) == 0x8000
    assert ((after - before).abs() <= units * before.abs())[~tie].all()
    return None


@pytest.mark.parametrize("master", ["fp32", "split16", "kahan"])
@pytest.mark.parametrize("name", ["adam", "ftrl"])
def test_lazy_updates_gather_every_plane(name: str, master: str) -> None:
    """Rows that are present are updated as by a dense gradient; others keep every plane."""
    rows = torch.tensor([4, 1, 4])
    values = random(1, 3, 5)
    grad = torch.sparse_coo_tensor(rows[None], values, (6, 5))
    summed = grad.coalesce().to_dense()
    for weight in (random(0, 6, 5), random(0, 5, 6).t()):  # the second is gathered
        results = []
        for lazy, given in ((True, grad), (False, summed)):
            opt = create(name, master, lazy_update=lazy)
            mine = weight.clone()
            state = opt.create_state_multi_precision(0, mine)
            opt.update_multi_precision(0, mine, random(2, 6, 5), state)  # low bits that rows can lose
            start = [t.clone() for t in (mine, *flatten(state))]
            opt.update_multi_precision(0, mine, given, state)
            results.append((start, [mine, *flatten(state)]))
        (start, lazily), (_, densely) = results
        assert start[1].any()
        present = torch.tensor([1, 4])
        absent = torch.tensor([0, 2, 3, 5])
        assert_same([t[present] for t in lazily], [t[present] for t in densely])
        assert_same([t[absent] for t in lazily], [t[absent] for t in start])


@pytest.mark.parametrize("master", OTHERS)
@pytest.mark.parametrize("name", ["adamw", "sgld"])
def test_layout_and_order_do_not_matter(name: str, master: str) -> None:
    weights = [random(0, 6, 4).t(), random(1, 25)[1:], random(2, 8, 2)[:, 0]]
    runs = []
    for fused, order in ((None, 1), (False, 1), (None, -1)):
        opt = create(name, master, use_fused_step=fused)
        mine = [w.clone(memory_format=torch.preserve_format) for w in weights]
        states = [opt.create_state_multi_precision(i, w) for i, w in enumerate(mine)]
        for step in range(2):
            grads = [random(10 * step + i, *w.shape) for i, w in enumerate(mine)]
            lists = [items[::order] for items in ([0, 1, 2], mine, grads, states)]
            opt.update_multi_precision(*lists)
        runs.append([*mine, *flatten(states)])
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("master", ["split8", "stochastic"])
def test_random_bits_go_by_the_seed_and_the_count(master: str) -> None:
    def trained(seed: int, first: int = 0) -> list[torch.Tensor]:
        run = Run(create("sgd", master, rounding_seed=seed, begin_num_update=first))
        run.step(0)
        return run.tensors()[:2]

    assert_same(trained(0), trained(0))
    assert not torch.equal(trained(0)[1], trained(1)[1]) or master == "split8"
    assert not torch.equal(masters_after_a_step(master, 0), masters_after_a_step(master, 1))
    assert not torch.equal(masters_after_a_step(master, 0), masters_after_a_step(master, 0, first=1))


def masters_after_a_step(master: str, seed: int, first: int = 0) -> torch.Tensor:
    run = Run(create("sgd", master, rounding_seed=seed, begin_num_update=first))
    run.step(0)
    return run.masters()[1]


@pytest.mark.parametrize("master", [*MASTERS, None])
def test_update_takes_states_of_either_kind(master: str | None) -> None:
    """`update` goes by the state, as MXNet's does."""
    opt, weight = create("adam", master), random(0, 20)
    both = opt.create_state_multi_precision(0, weight)
    for state in (both, opt.create_state(0, weight)):
        before = weight.clone()
        opt.update(0, weight, random(1, 20), state)
        assert not torch.equal(weight, before)


class Ported(tritopt.Optimizer):
    """Optimizer that is written as MXNet's are."""

    def create_state(self, index: Any, weight: torch.Tensor) -> Any:
        return None

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        assert all(weight.dtype == F32 for weight in weights)
        self._update_count(indices)
        for weight, grad in zip(weights, grads, strict=True):
            weight[:] = weight - grad


def test_an_optimizer_that_overrides_step_sees_fp32_masters() -> None:
    for master in OTHERS:
        with pytest.raises(ValueError, match=rf"master='{master}' is not for Ported, which overrides step.*'fp32'"):
            Ported(multi_precision=True, master=master)
    opt, weight = Ported(multi_precision=True, master="fp32"), random(0, 7)
    state = opt.create_state_multi_precision(0, weight)
    opt.update_multi_precision(0, weight, random(1, 7), state)
    assert torch.equal(weight, state[0].bfloat16())
    before = state[0].clone()
    weight.data[:3] = 2.0  # which is then the truth, and not the master
    opt.update_multi_precision(0, weight, torch.zeros_like(weight), state)
    assert torch.equal(state[0], torch.cat([torch.full((3,), 2.0), before[3:]]))
    assert torch.equal(weight, state[0].bfloat16())


@pytest.mark.parametrize("master", [name for name, fmt in MASTERS.items() if fmt.companion])
def test_a_weight_that_is_negated_by_a_bit_has_a_master(master: str) -> None:
    """The master is right from its creation on, and in another format."""
    opt, weight = create("sgd", master, use_fused_step=False), random(0, 7)
    for each in (weight, torch._neg_view(-weight)):
        state = opt.create_state_multi_precision(0, each)
        decoded = MASTERS[master].decode((each, state[0]), F32)
        assert torch.equal(decoded, weight.float())
        assert torch.equal(
            MASTERS["fp32"].decode((each, create("sgd", "fp32").convert_state(0, each, state)[0]), F32), decoded
        )


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_an_optimizer_that_overrides_step_starts_from_a_weight_that_was_written(dtype: torch.dtype) -> None:
    """Only where it was: its neighbours keep the low bits of their masters."""
    opt, weight = Ported(multi_precision=True, master="fp32"), random(0, 7, dtype=dtype)
    state = opt.create_state_multi_precision(0, weight)
    opt.update_multi_precision(0, weight, random(1, 7, dtype=dtype) / 1000, state)
    expected = state[0].clone()
    assert not torch.equal(expected[1::2], weight[1::2].float())
    for value, is_negated in ((3.0, False), (-5.0, True)):
        written = torch._neg_view(-weight) if is_negated else weight
        written[::2] = torch.tensor([-0.0, value, torch.inf, -value], dtype=dtype)
        grad = random(2, 7, dtype=dtype) / 1000
        expected[::2] = written[::2].float()
        expected -= grad.float()
        opt.update_multi_precision(0, written, grad, state)
        assert torch.equal(state[0], expected)
        assert torch.equal(written, expected.to(dtype))


def test_bad_names_and_pairs_are_refused() -> None:
    names = "'fp32', 'split16', 'split8', 'kahan', 'stochastic', or None"
    for bad in ("fp64", "Split16", "", True, 16, ["fp32"]):
        with pytest.raises(ValueError, match=rf"must be one of {names}"):
            tritopt.create("adam", multi_precision=True, master=bad)
    with pytest.raises(ValueError, match="rounding_seed=-1"):
        tritopt.create("adam", rounding_seed=-1)
    for master in ("split8", "stochastic"):
        with pytest.raises(ValueError, match="lazy_update=True draws no random bits"):
            create("adam", master, lazy_update=True)
    half = random(0, 5, dtype=F16)
    for master in ("split16", "split8", "stochastic"):
        with pytest.raises(
            ValueError, match=r"parameter 'w': .* bfloat16 weights, not torch\.float16.*'fp32' or 'kaha"
        ):
            create("adam", master).create_state_multi_precision("w", half)
        updater = tritopt.get_updater(create("adam", master))
        with pytest.raises(ValueError, match="completes bfloat16"):
            updater("w", half, half.clone())
        assert not updater.states
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(tritopt.create("adam", master="split16").create_state_multi_precision(0, half)) == 2  # no masters


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("master", COMPANIONS)
@pytest.mark.parametrize("name", ["sgd", "nag", "adam"])
def test_a_state_of_another_kind_is_refused(name: str, master: str, fused: bool | None) -> None:
    opt, weight = create(name, master, use_fused_step=fused), random(0, 6)
    companion, inner = opt.create_state_multi_precision(0, weight)
    other = next(dtype for dtype in COMPANIONS.values() if dtype != companion.dtype)
    dtype = str(companion.dtype).removeprefix("torch.")
    before = [t.clone() for t in flatten([weight, companion, inner])]
    for bad in (inner, (companion.to(other), inner), (inner, companion), [companion, inner], None):
        if isinstance(bad, tuple) and master == "fp32" and bad[0] is inner and isinstance(inner, torch.Tensor):
            continue  # two bare fp32 tensors: nothing shows that they are exchanged
        with pytest.raises(ValueError, match=rf"master='{master}' needs a state \({dtype} .*create_state_multi_prec"):
            opt.update_multi_precision(0, weight, random(1, 6), bad)
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        opt.update_multi_precision(0, weight, random(1, 6), (companion[:5], inner))
    assert_same(flatten([weight, companion, inner]), before)
    assert opt.num_update == 0
