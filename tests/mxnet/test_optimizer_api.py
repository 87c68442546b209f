"""The API of `Optimizer`, in the order of section 1 of MXNet's contract, with the project's deviations from it."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tritopt
from tritopt import Optimizer
from tritopt.lr_scheduler import FactorScheduler, LRScheduler, PolyScheduler

# One configuration of each that has all the states it can have.
CONFIGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "nag": {},
    "adam": {},
    "adamw": {},
    "lamb": {},
    "test": {},
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
BOTH_PATHS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "step"])
LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


class Recorder(LRScheduler):
    """Constant rate; remembers what it was asked."""

    def __init__(self, base_lr: float = 0.5) -> None:
        super().__init__(base_lr)
        self.asked: list[int] = []

    def __call__(self, num_update: int) -> float:
        self.asked.append(num_update)
        return self.base_lr


class Symbol:
    """The part of MXNet's Symbol that an optimizer reads; attributes are strings there."""

    def attr_dict(self) -> dict[str, dict[str, str]]:
        return {"fc_weight": {"__lr_mult__": "2.0"}, "fc_bias": {"__wd_mult__": "0.0"}, "aux": {"__lr_mult__": "9.0"}}

    def list_arguments(self) -> list[str]:
        return ["data", "fc_weight", "fc_bias"]


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Drawn on the CPU, so that they are the same numbers wherever the tests run."""
    numbers = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def create(name: str, fused: bool | None = None, **kwargs: Any) -> Optimizer:
    return tritopt.create(name, use_fused_step=fused, **{**CONFIGS[name], **kwargs})


def flatten(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from flatten(part)


def states_of(opt: Optimizer, weights: Sequence[torch.Tensor]) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return [opt.create_state_multi_precision(i, weight) for i, weight in enumerate(weights)]


def train(opt: Optimizer, weights: list[torch.Tensor], states: list[Any], seeds: Sequence[int]) -> None:
    for seed in seeds:
        grads = [values(seed + 100 * i, *weight.shape, dtype=weight.dtype) for i, weight in enumerate(weights)]
        opt.update_multi_precision(list(range(len(weights))), weights, grads, states)


# 1.1 and 1.6: the constructor.


def test_base_attributes_by_default() -> None:
    opt = Optimizer()
    assert (opt.rescale_grad, opt.clip_gradient, opt.wd) == (1.0, None, 0.0)
    assert (opt.lr, opt.lr_scheduler, opt.learning_rate) == (0.01, None, 0.01)
    assert (opt.begin_num_update, opt.num_update, opt.multi_precision) == (0, 0, False)
    assert (opt.idx2name, opt.param_dict, opt.sym_info, opt.lr_mult, opt.wd_mult) == ({}, {}, (), {}, {})
    assert opt._all_index_update_counts == {0: {}}
    assert opt._index_update_count is opt._all_index_update_counts[0]
    assert opt.use_fused_step is None
    assert opt.aggregate_num == math.inf


def test_base_attributes_as_given() -> None:
    scheduler = Recorder()
    opt = Optimizer(
        rescale_grad=0.25,
        wd=0.1,
        clip_gradient=2.0,
        lr_scheduler=scheduler,
        begin_num_update=7,
        multi_precision=True,
        aggregate_num=4,
        use_fused_step=False,
    )
    assert (opt.rescale_grad, opt.wd, opt.clip_gradient, opt.begin_num_update) == (0.25, 0.1, 2.0, 7)
    assert opt.lr_scheduler is scheduler
    assert opt.num_update == 7
    assert (opt.multi_precision, opt.aggregate_num, opt.use_fused_step) == (True, 4, False)


def test_names_are_copied_and_param_dict_is_not() -> None:
    names, params = {0: "weight"}, {0: SimpleNamespace(lr_mult=1.0, wd_mult=1.0)}
    opt = Optimizer(param_idx2name=names, param_dict=params)
    assert opt.idx2name == names
    assert opt.idx2name is not names
    assert opt.param_dict is params


@pytest.mark.parametrize("value", [0, 1, 4, math.inf, None])
def test_aggregate_num_is_honoured_by_all(value: float | None) -> None:
    for name in CONFIGS:
        assert create(name, aggregate_num=value).aggregate_num == (math.inf if value is None else value)


@pytest.mark.parametrize("value", [True, False, None])
def test_use_fused_step_is_kept(value: bool | None) -> None:
    for name in CONFIGS:
        assert create(name, value).use_fused_step is value


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("sgd", {"lr": 0.1, "momentum": 0.0, "lazy_update": False}),
        ("nag", {"lr": 0.1, "momentum": 0.9}),
        ("adam", {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "lazy_update": False}),
        ("adamw", {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-6, "correct_bias": True}),
        (
            "lamb",
            {
                "lr": 0.001,
                "beta1": 0.9,
                "beta2": 0.999,
                "epsilon": 1e-6,
                "lower_bound": None,
                "upper_bound": None,
                "bias_correction": True,
            },
        ),
        ("test", {"lr": 0.01}),
    ],
)
def test_hyperparameter_defaults(name: str, defaults: dict[str, Any]) -> None:
    opt = tritopt.create(name)
    assert {key: getattr(opt, key) for key in defaults} == defaults
    assert (opt.wd, opt.clip_gradient, opt.use_fused_step, opt.aggregate_num) == (0.0, None, None, math.inf)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_lazy_update_needs_the_fused_step(name: str) -> None:
    with pytest.raises(ValueError, match=r"lazy_update=True .*use_fused_step=False"):
        tritopt.create(name, lazy_update=True, use_fused_step=False)
    assert tritopt.create(name, lazy_update=True).lazy_update is True


def test_lazy_update_and_multi_precision() -> None:
    with pytest.raises(ValueError, match=r"lazy_update=True .*multi_precision=True"):
        tritopt.SGD(lazy_update=True, multi_precision=True)
    assert tritopt.Adam(lazy_update=True, multi_precision=True).multi_precision


# 1.2: learning_rate and lr_scheduler.


def test_learning_rate_replaces_the_base_of_a_schedule() -> None:
    scheduler = FactorScheduler(step=5, factor=0.5, base_lr=2.0, warmup_steps=4)
    with pytest.warns(UserWarning, match=r"0\.3.*2\.0"):
        opt = Optimizer(learning_rate=0.3, lr_scheduler=scheduler)
    assert (opt.lr, scheduler.base_lr, scheduler.warmup_final_lr) == (0.3, 0.3, 2.0)
    # The linear warm-up still heads for the old base.
    assert scheduler(2) == 1.0
    assert scheduler(5) == 0.3
    assert scheduler(6) == 0.15


def test_learning_rate_equal_to_the_base_is_silent() -> None:
    scheduler = FactorScheduler(step=5, base_lr=0.3)
    assert Optimizer(learning_rate=0.3, lr_scheduler=scheduler).learning_rate == 0.3


@pytest.mark.parametrize(
    ("name", "lr"), [("sgd", 0.1), ("nag", 0.1), ("adam", 0.001), ("adamw", 0.001), ("lamb", 0.001)]
)
def test_default_learning_rate_replaces_the_base_too(name: str, lr: float) -> None:
    scheduler = FactorScheduler(step=5, base_lr=2.0)
    with pytest.warns(UserWarning, match="learning_rate"):
        opt = tritopt.create(name, lr_scheduler=scheduler)
    assert scheduler.base_lr == opt.learning_rate == lr


@EVERY
def test_learning_rate_none_keeps_the_base(name: str) -> None:
    scheduler = FactorScheduler(step=5, base_lr=2.0)
    opt = tritopt.create(name, learning_rate=None, lr_scheduler=scheduler)
    assert opt.lr is None
    assert scheduler.base_lr == opt.learning_rate == 2.0


@pytest.mark.parametrize("cls", [Optimizer, tritopt.Test])
def test_base_and_test_keep_the_base_by_default(cls: type[Optimizer]) -> None:
    opt = cls(lr_scheduler=FactorScheduler(step=5, base_lr=2.0))
    assert opt.lr is None
    assert opt.learning_rate == 2.0


@EVERY
def test_learning_rate_none_without_a_schedule(name: str) -> None:
    assert tritopt.create(name, learning_rate=None).learning_rate == 0.01


def test_poly_ignores_the_learning_rate() -> None:
    with pytest.warns(UserWarning, match="learning_rate"):
        opt = tritopt.SGD(learning_rate=0.3, lr_scheduler=PolyScheduler(max_update=100, base_lr=5.0))
    assert opt.learning_rate == 5.0


@pytest.mark.parametrize("cls", [Optimizer, tritopt.SGD, tritopt.NAG, tritopt.Test])
def test_the_warning_points_at_the_caller(cls: type[Optimizer]) -> None:
    with pytest.warns(UserWarning, match="learning_rate") as record:
        cls(learning_rate=0.3, lr_scheduler=FactorScheduler(step=5, base_lr=2.0))
    assert record[0].filename == __file__


def test_set_learning_rate() -> None:
    opt = tritopt.SGD()
    opt.set_learning_rate(0.7)
    assert opt.lr == opt.learning_rate == 0.7
    opt = tritopt.SGD(learning_rate=None, lr_scheduler=Recorder(0.5))
    with pytest.raises(UserWarning, match=r"0\.7"):
        opt.set_learning_rate(0.7)
    assert opt.learning_rate == 0.5


def test_schedule_is_asked_at_num_update_after_counting() -> None:
    scheduler = Recorder()
    opt = tritopt.SGD(learning_rate=None, lr_scheduler=scheduler, begin_num_update=10)
    assert opt.learning_rate == 0.5
    assert scheduler.asked == [10]
    opt.update(0, values(0, 3), values(1, 3), None)
    assert scheduler.asked == [10, 11]


# 1.3: counting.


def test_update_count() -> None:
    opt = Optimizer(begin_num_update=3)
    opt._update_count("a")
    opt._update_count(["a", "b"])
    opt._update_count(("b", 7, "a"))
    assert opt._index_update_count == {"a": 6, "b": 5, 7: 4}
    assert opt.num_update == 6


def test_counts_are_kept_per_device_and_num_update_is_shared() -> None:
    opt = Optimizer()
    opt._update_count([0, 0, 1])
    opt._set_current_device(2)
    opt._update_count(0)
    assert opt._all_index_update_counts == {0: {0: 2, 1: 1}, 2: {0: 1}}
    assert opt._index_update_count is opt._all_index_update_counts[2]
    assert opt.num_update == 2
    with pytest.warns(DeprecationWarning, match="_set_current_device"):
        opt._set_current_context(0)
    assert opt._index_update_count is opt._all_index_update_counts[0]


@EVERY
@BOTH_PATHS
def test_a_late_parameter_counts_from_the_beginning(name: str, fused: bool) -> None:
    opt = create(name, fused)
    weights = [values(0, 5), values(1, 5)]
    states = states_of(opt, weights)
    train(opt, weights[:1], states[:1], range(4))
    opt.update(1, weights[1], values(9, 5), states[1])
    assert opt._index_update_count == {0: 4, 1: 1}
    assert opt.num_update == 4

    # The bias corrections are those of a first step.
    alone, fresh = [values(1, 5)], create(name, fused)
    fresh.update(1, alone[0], values(9, 5), states_of(fresh, alone)[0])
    assert torch.equal(weights[1], alone[0])


@BOTH_PATHS
def test_all_of_a_list_is_counted_before_the_schedule_is_asked(fused: bool) -> None:
    scheduler = Recorder()
    opt = tritopt.SGD(learning_rate=None, lr_scheduler=scheduler, use_fused_step=fused)
    weights = [values(0, 3), values(1, 3)]
    opt.update(1, weights[1], values(2, 3), None)
    scheduler.asked.clear()
    # Index 0, counted once, stands before index 1, counted twice; both see update 2, in one evaluation.
    opt.update([0, 1], weights, [values(3, 3), values(4, 3)], [None, None])
    assert scheduler.asked == [2]


@BOTH_PATHS
def test_begin_num_update_enters_the_bias_correction(fused: bool) -> None:
    resumed, running = (tritopt.Adam(begin_num_update=begin, use_fused_step=fused) for begin in (4, 0))
    weights = [values(0, 5)]
    states = states_of(running, weights)
    train(running, weights, states, range(4))
    copies, copied_states = copy.deepcopy((weights, states))
    train(running, weights, states, [4])
    train(resumed, copies, copied_states, [4])
    assert torch.equal(weights[0], copies[0])
    assert resumed.num_update == running.num_update == 5


# 1.4: multipliers.


def test_first_matching_rule_wins() -> None:
    names = {0: "a", 1: "b", 2: "c", 3: "d"}
    params = {0: SimpleNamespace(lr_mult=2.0, wd_mult=3.0)}
    opt = Optimizer(learning_rate=1.0, wd=10.0, param_idx2name=names, param_dict=params)
    opt.set_lr_mult({0: 100.0, "a": 100.0, 1: 4.0, "b": 100.0, "c": 5.0})
    opt.set_wd_mult({0: 100.0, "a": 100.0, 1: 6.0, "b": 100.0, "c": 7.0})
    assert opt._get_lrs([0, 1, 2, 3, 4]) == [2.0, 4.0, 5.0, 1.0, 1.0]
    assert opt._get_wds([0, 1, 2, 3, 4]) == [30.0, 60.0, 70.0, 10.0, 10.0]
    assert (opt._get_lr(1), opt._get_wd(2)) == (4.0, 70.0)


def test_a_name_has_no_effect_without_param_idx2name() -> None:
    opt = Optimizer(learning_rate=1.0)
    opt.set_lr_mult({"a": 5.0})
    assert opt._get_lrs([0]) == [1.0]


def test_param_dict_is_read_live() -> None:
    params = {0: SimpleNamespace(lr_mult=1.0, wd_mult=1.0)}
    opt = Optimizer(learning_rate=0.1, param_dict=params)
    assert opt._get_lr(0) == 0.1
    params[0].lr_mult = 2.0
    assert opt._get_lr(0) == 0.2


def test_nn_parameters_carry_multipliers() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    opt = Optimizer(learning_rate=1.0, wd=1.0, param_dict={0: parameter})
    assert (opt._get_lr(0), opt._get_wd(0)) == (1.0, 1.0)
    parameter.lr_mult, parameter.wd_mult = 0.5, 0.25  # type: ignore[attr-defined]
    assert (opt._get_lr(0), opt._get_wd(0)) == (0.5, 0.25)


def test_multiplier_by_name_reaches_an_nn_parameter_that_carries_none() -> None:
    # `module_parameters` gives both names and parameters: set_lr_mult must not be a silent no-op beside them.
    model = nn.Linear(2, 2)
    params = tritopt.module_parameters(model)
    opt = Optimizer(learning_rate=1.0, wd=1.0, param_idx2name=params.idx2name, param_dict=params.param_dict)
    opt.set_lr_mult({"weight": 0.5})
    opt.set_wd_mult({"bias": 0.0})
    assert opt._get_lrs(params.indices) == [0.5, 1.0]
    assert opt._get_wds(params.indices) == [1.0, 0.0]


def test_set_mult_replaces_what_was_set_before() -> None:
    opt = Optimizer(learning_rate=1.0, wd=1.0)
    opt.set_lr_mult({0: 2.0})
    opt.set_lr_mult({1: 3.0})
    assert opt.lr_mult == {1: 3.0}
    opt.set_wd_mult({0: 2.0})
    opt.set_wd_mult({1: 3.0})
    assert opt.wd_mult == {1: 3.0}


def test_symbol_attributes_seed_the_multipliers() -> None:
    names = {0: "fc_weight", 1: "fc_bias"}
    opt = Optimizer(learning_rate=1.0, wd=1.0, sym=Symbol(), param_idx2name=names)
    # "aux" is no argument.
    assert (opt.lr_mult, opt.wd_mult) == ({"fc_weight": 2.0}, {"fc_bias": 0.0})
    assert opt._get_lrs([0, 1]) == [2.0, 1.0]
    assert opt._get_wds([0, 1]) == [1.0, 0.0]
    opt.set_lr_mult({"fc_bias": 3.0})
    assert opt.lr_mult == {"fc_weight": 2.0, "fc_bias": 3.0}
    opt.set_lr_mult({"fc_weight": 4.0})
    assert opt.lr_mult == {"fc_weight": 4.0}


def test_bias_is_decayed_like_anything_else() -> None:
    opt = tritopt.SGD(wd=0.5, param_idx2name={0: "fc_bias", 1: "bn_gamma", 2: "bn_beta"})
    assert opt._get_wds([0, 1, 2]) == [0.5, 0.5, 0.5]


def test_one_evaluation_of_the_schedule_per_call() -> None:
    scheduler = Recorder()
    opt = Optimizer(lr_scheduler=scheduler)
    opt._get_lrs([0, 1, 2])
    assert scheduler.asked == [0]


@BOTH_PATHS
def test_multipliers_reach_the_update(fused: bool) -> None:
    opt = tritopt.SGD(learning_rate=0.5, wd=0.25, use_fused_step=fused)
    opt.set_lr_mult({1: 2.0})
    opt.set_wd_mult({0: 2.0})
    weights = [torch.full((2,), 8.0) for _ in range(2)]
    opt.update([0, 1], weights, [torch.ones(2)] * 2, [None, None])
    assert weights[0].tolist() == [8 - 0.5 * (1 + 0.5 * 8)] * 2
    assert weights[1].tolist() == [8 - 1.0 * (1 + 0.25 * 8)] * 2


# 1.5: states.


def test_the_base_class_has_no_state_and_no_step() -> None:
    opt = Optimizer()
    weight = values(0, 3)
    assert opt.create_state(0, weight) is None
    assert opt.create_state_multi_precision(0, weight) is None
    with pytest.raises(NotImplementedError):
        opt.step([0], [weight], [weight.clone()], [None])
    with pytest.raises(NotImplementedError):
        opt.update(0, weight, weight.clone(), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "kwargs", "count", "fp32"),
    [
        ("sgd", {"momentum": 0.0}, 0, False),
        ("sgd", {"momentum": 0.9}, 1, False),
        ("nag", {"momentum": 0.0}, 0, False),
        ("nag", {}, 1, False),
        ("adam", {}, 2, False),
        ("adamw", {}, 2, False),
        ("lamb", {}, 2, True),
        ("test", {}, 1, True),
    ],
)
def test_fresh_states(name: str, kwargs: dict[str, Any], count: int, fp32: bool, dtype: torch.dtype) -> None:
    opt = tritopt.create(name, **kwargs)
    weight = nn.Parameter(values(0, 3, 4, dtype=dtype))
    state = opt.create_state(0, weight)
    tensors = list(flatten(state))
    assert len(tensors) == count
    assert state is None if count == 0 else isinstance(state, torch.Tensor if count == 1 else tuple)
    for tensor in tensors:
        assert (tensor.shape, tensor.device) == (weight.shape, weight.device)
        # fp64 weights keep fp64 states even where MXNet fixes fp32.
        assert tensor.dtype == (torch.promote_types(dtype, torch.float32) if fp32 else dtype)
        assert not tensor.requires_grad
        assert not tensor.any()


@EVERY
@LOW_PRECISION
def test_multi_precision_wraps_low_precision_weights(name: str, dtype: torch.dtype) -> None:
    opt = create(name, multi_precision=True)
    weight = nn.Parameter(values(0, 3, 4, dtype=dtype))
    state = opt.create_state_multi_precision(0, weight)
    assert isinstance(state, tuple)
    master, inner = state
    assert master.dtype == torch.float32
    assert not master.requires_grad
    assert torch.equal(master, weight.float())
    assert all(tensor.dtype == torch.float32 for tensor in flatten(inner))
    assert [t.shape for t in flatten(inner)] == [t.shape for t in flatten(opt.create_state(0, master))]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_multi_precision_leaves_other_weights_alone(name: str, dtype: torch.dtype) -> None:
    opt, weight = create(name, multi_precision=True), values(0, 3, dtype=dtype)
    wrapped, plain = opt.create_state_multi_precision(0, weight), opt.create_state(0, weight)
    assert type(wrapped) is type(plain)
    assert [t.dtype for t in flatten(wrapped)] == [t.dtype for t in flatten(plain)]


@EVERY
def test_master_is_a_copy_even_of_a_weight_that_needs_no_cast(name: str) -> None:
    opt, weight = create(name, multi_precision=True), torch.ones(3, dtype=torch.float16)
    master = next(flatten(opt.create_state_multi_precision(0, weight)))
    weight.zero_()
    assert master.tolist() == [1.0] * 3


@EVERY
@LOW_PRECISION
def test_low_precision_without_master_warns(name: str, dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=rf"{dtype}.*multi_precision=True"):
        state = create(name).create_state_multi_precision("w", values(0, 3, dtype=dtype))
    assert [t.shape for t in flatten(state)] == [(3,)] * len(list(flatten(state)))


@EVERY
@BOTH_PATHS
def test_mixed_dtypes_in_one_list(name: str, fused: bool) -> None:
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float16]
    weights = [values(i, 4, dtype=dtype) for i, dtype in enumerate(dtypes)]
    single = [weight.clone() for weight in weights]
    opt = create(name, fused, multi_precision=True)
    states, single_states = states_of(opt, weights), states_of(opt, single)
    train(opt, weights, states, range(3))
    for weight, state, dtype in zip(weights, states, dtypes, strict=True):
        if dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(weight, state[0].to(dtype))

    alone = create(name, fused, multi_precision=True)
    for seed in range(3):
        for i, weight in enumerate(single):
            alone.update_multi_precision(i, weight, values(seed + 100 * i, 4, dtype=dtypes[i]), single_states[i])
    assert all(map(torch.equal, weights, single))
    assert alone._index_update_count == opt._index_update_count == dict.fromkeys(range(5), 3)


@EVERY
@BOTH_PATHS
def test_gradient_may_have_another_dtype(name: str, fused: bool) -> None:
    opt = create(name, fused)
    weights = [values(0, 7), values(0, 7)]
    grad = values(1, 7, dtype=torch.bfloat16)
    opt.update([0, 1], weights, [grad, grad.float()], states_of(opt, weights))
    assert torch.equal(weights[0], weights[1])


@BOTH_PATHS
def test_master_accumulates_what_the_weight_cannot_show(fused: bool) -> None:
    # Half an ulp of 1.0 in bf16 is 2^-9: without a master each update is rounded away.
    grad = torch.full((2,), 2.0**-10)
    weights = [torch.ones(2, dtype=torch.bfloat16) for _ in range(2)]
    for weight, multi_precision in zip(weights, (True, False), strict=True):
        opt = tritopt.SGD(learning_rate=1.0, multi_precision=multi_precision, use_fused_step=fused)
        (state,) = states_of(opt, [weight])
        for _ in range(8):
            opt.update_multi_precision(0, weight, grad, state)
    assert weights[0].tolist() == [1 - 2.0**-7] * 2
    assert weights[1].tolist() == [1.0] * 2


@EVERY
@BOTH_PATHS
def test_scalars_do_what_lists_do(name: str, fused: bool) -> None:
    opt, single = create(name, fused), create(name, fused)
    weight, other = values(0, 5), values(0, 5)
    (state,), (other_state,) = states_of(opt, [weight]), states_of(opt, [other])
    opt.update(["w"], [weight], [values(1, 5)], [state])
    single.update("w", other, values(1, 5), other_state)
    assert torch.equal(weight, other)
    opt.update_multi_precision(("w",), (weight,), (values(2, 5),), (state,))
    single.update_multi_precision("w", other, values(2, 5), other_state)
    assert torch.equal(weight, other)
    assert single._index_update_count == {"w": 2}


@EVERY
@BOTH_PATHS
def test_indices_are_any_hashables_in_any_order(name: str, fused: bool) -> None:
    opt, plain = create(name, fused), create(name, fused)
    indices: list[Any] = [7, "w", (1, "x"), -3, None]
    weights = [values(i, 3) for i in range(5)]
    expected = [weight.clone() for weight in weights]
    train(plain, expected, states_of(plain, expected), [0])
    grads = [values(100 * i, 3) for i in range(5)]
    opt.update(indices, weights, grads, states_of(opt, weights))
    assert all(map(torch.equal, weights, expected))
    assert opt._index_update_count == dict.fromkeys(indices, 1)


# 1.5: pickling.


@EVERY
@BOTH_PATHS
@pytest.mark.parametrize(
    "duplicate", [lambda opt: pickle.loads(pickle.dumps(opt)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_a_pickled_optimizer_continues(name: str, fused: bool, duplicate: Any) -> None:
    opt = create(
        name,
        fused,
        learning_rate=None,
        lr_scheduler=FactorScheduler(step=2, factor=0.5, base_lr=0.25),
        wd=0.01,
        param_idx2name={0: "a"},
        param_dict={1: nn.Parameter(torch.zeros(1))},
        begin_num_update=2,
        multi_precision=True,
    )
    opt.set_lr_mult({"a": 2.0})
    weights = [values(0, 5), values(1, 5, dtype=torch.float16)]
    states = states_of(opt, weights)
    train(opt, weights, states, range(3))
    weights_before, states_before = copy.deepcopy((weights, states))

    twin = duplicate(opt)
    assert type(twin) is type(opt)
    assert twin.param_dict == {}
    assert opt.param_dict.keys() == {1}
    assert twin._index_update_count is twin._all_index_update_counts[0]
    assert twin._index_update_count == {0: 5, 1: 5}
    # What is carried over is the position in the schedule, not a schedule from the start.
    assert twin.lr_scheduler is not opt.lr_scheduler
    assert vars(twin.lr_scheduler) == vars(opt.lr_scheduler)

    train(opt, weights, states, range(3, 6))
    train(twin, weights_before, states_before, range(3, 6))
    assert all(map(torch.equal, weights, weights_before))
    assert all(map(torch.equal, flatten(states), flatten(states_before)))
    assert twin._index_update_count == opt._index_update_count
    assert twin.num_update == opt.num_update


def test_pickling_keeps_the_current_device() -> None:
    opt = tritopt.SGD()
    opt._set_current_device(3)
    opt._update_count([0])
    twin = pickle.loads(pickle.dumps(opt))
    assert twin._index_update_count is twin._all_index_update_counts[3]
    assert twin._all_index_update_counts == {0: {}, 3: {0: 1}}


# Optimizers written for MXNet: the import is all that changes.


class Ported(Optimizer):
    """Heavy ball in MXNet's style; remembers the dtypes and requires_grad of what it was given."""

    def __init__(self, learning_rate: float = 0.1, momentum: float = 0.5, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.momentum = momentum
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    def create_state(self, index: Any, weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weight)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, mom in zip(indices, weights, grads, states, strict=True):
            self.seen.append((weight.dtype, grad.dtype))
            self._update_count(index)
            lr, wd = self._get_lr(index), self._get_wd(index)
            grad = grad * self.rescale_grad
            if self.clip_gradient is not None:
                grad = grad.clip(-self.clip_gradient, self.clip_gradient)
            grad = grad + wd * weight
            mom[:] *= self.momentum
            mom[:] -= lr * grad
            weight[:] += mom


class PortedWithKernel(Ported):
    """Brings a fused step too."""

    fused_calls = 0

    def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self.fused_calls += 1
        self.step(indices, weights, grads, states)


PORTED = pytest.mark.parametrize("cls", [Ported, PortedWithKernel])


@PORTED
def test_ported_optimizer_agrees_with_sgd(cls: type[Ported]) -> None:
    settings: dict[str, Any] = {
        "learning_rate": 0.25,
        "momentum": 0.5,
        "wd": 0.5,
        "rescale_grad": 0.5,
        "clip_gradient": 0.5,
    }
    opt, sgd = cls(**settings), tritopt.SGD(**settings, use_fused_step=False)
    weights, expected = [values(0, 4), values(1, 3)], [values(0, 4), values(1, 3)]
    states, expected_states = states_of(opt, weights), states_of(sgd, expected)
    train(opt, weights, states, range(3))
    train(sgd, expected, expected_states, range(3))
    # Its sums are associated in another way.
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, other)
    assert opt._index_update_count == {0: 3, 1: 3}


@PORTED
@LOW_PRECISION
def test_ported_optimizer_sees_master_and_fp32_gradient(cls: type[Ported], dtype: torch.dtype) -> None:
    opt = cls(multi_precision=True)
    weights = [values(0, 4, dtype=dtype), values(1, 4)]
    states = states_of(opt, weights)
    grads = [values(2, 4, dtype=dtype), values(3, 4)]
    before = [grad.clone() for grad in grads]
    opt.update_multi_precision([0, 1], weights, grads, states)
    assert opt.seen == [(torch.float32, torch.float32)] * 2
    assert [grad.dtype for grad in grads] == [dtype, torch.float32]
    assert all(map(torch.equal, grads, before))
    assert torch.equal(weights[0], states[0][0].to(dtype))
    torch.testing.assert_close(states[0][0], values(0, 4, dtype=dtype).float() - 0.1 * grads[0].float())


@pytest.mark.parametrize(("wanted", "calls"), [(True, 1), (False, 0)])
def test_use_fused_step_picks_the_ported_step(wanted: bool, calls: int) -> None:
    opt = PortedWithKernel(use_fused_step=wanted)
    opt.update(0, values(0, 4), values(1, 4), torch.zeros(4))
    assert opt.fused_calls == calls
    assert len(opt.seen) == 1


@PORTED
def test_ported_optimizer_updates_an_nn_parameter(cls: type[Ported]) -> None:
    opt = cls()
    weight = nn.Parameter(values(0, 4))
    opt.update_multi_precision([0], [weight], [values(1, 4)], states_of(opt, [weight]))
    torch.testing.assert_close(weight.detach(), values(0, 4) - 0.1 * values(1, 4))
    assert weight.requires_grad
    assert weight.is_leaf


@PORTED
def test_ported_optimizer_is_not_given_none_gradients(cls: type[Ported]) -> None:
    opt = cls()
    weights = [values(0, 4), values(1, 4)]
    opt.update_multi_precision([0, 1], weights, [None, values(2, 4)], states_of(opt, weights))
    assert opt._index_update_count == {1: 1}
    assert torch.equal(weights[0], values(0, 4))


@pytest.mark.parametrize("base", [tritopt.SGD, tritopt.Adam, tritopt.LAMB])
def test_ported_states_need_not_be_those_of_the_base(base: type[Optimizer]) -> None:
    class OneState(base):  # type: ignore[misc, valid-type]
        create_state = Ported.create_state

        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for index, weight, grad, total in zip(indices, weights, grads, states, strict=True):
                self._update_count(index)
                total += grad
                weight -= self._get_lr(index) * total

    opt, weight = OneState(learning_rate=0.5, multi_precision=True), torch.ones(3, dtype=torch.float16)
    (state,) = states_of(opt, [weight])
    opt.update_multi_precision([0], [weight], [torch.ones(3, dtype=torch.float16)], [state])
    assert weight.tolist() == [0.5] * 3


def test_ported_optimizer_trains_through_an_updater() -> None:
    updater = tritopt.get_updater(Ported())
    weight = values(0, 4)
    updater(0, values(1, 4), weight)
    torch.testing.assert_close(weight, values(0, 4) - 0.1 * values(1, 4))


def test_overriding_step_alone_replaces_an_existing_optimizer() -> None:
    class Reversed(tritopt.SGD):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for index, weight, grad in zip(indices, weights, grads, strict=True):
                self._update_count(index)
                weight += self._get_lr(index) * grad

    opt, weight = Reversed(learning_rate=0.5), torch.ones(3)
    opt.update(0, weight, torch.ones(3), None)
    assert weight.tolist() == [1.5] * 3


# What an update skips and what it never touches.


@EVERY
@BOTH_PATHS
def test_none_gradients_are_skipped_and_not_counted(name: str, fused: bool) -> None:
    opt, alone = create(name, fused), create(name, fused)
    weights, expected = [values(i, 4) for i in range(3)], values(1, 4)
    states = states_of(opt, weights)
    opt.update_multi_precision([0, 1, 2], weights, [None, values(5, 4), None], states)
    alone.update_multi_precision([1], [expected], [values(5, 4)], states_of(alone, [expected]))
    assert torch.equal(weights[0], values(0, 4))
    assert torch.equal(weights[1], expected)
    assert torch.equal(weights[2], values(2, 4))
    assert opt._index_update_count == {1: 1}
    assert not any(tensor.any() for i in (0, 2) for tensor in flatten(states[i]))

    opt.update_multi_precision([0, 2], [weights[0], weights[2]], [None, None], [states[0], states[2]])
    opt.update(0, weights[0], None, states[0])
    assert opt._index_update_count == {1: 1}
    assert opt.num_update == 1


@EVERY
@BOTH_PATHS
def test_empty_lists(name: str, fused: bool) -> None:
    opt = create(name, fused)
    opt.update([], [], [], [])
    opt.update_multi_precision([], [], [], [])
    assert (opt.num_update, opt._index_update_count) == (0, {})


@EVERY
@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_empty_tensors_are_counted(name: str, fused: bool, dtype: torch.dtype) -> None:
    opt, alone = create(name, fused, multi_precision=True), create(name, fused, multi_precision=True)
    weights, expected = [values(0, 0, 3, dtype=dtype), values(1, 4, dtype=dtype)], [values(1, 4, dtype=dtype)]
    states = states_of(opt, weights)
    for _ in range(2):
        opt.update_multi_precision([0, 1], weights, [torch.empty_like(weights[0]), values(2, 4, dtype=dtype)], states)
    opt.update_multi_precision([0], weights[:1], [torch.empty_like(weights[0])], states[:1])
    assert opt._index_update_count == {0: 3, 1: 2}
    expected_states = states_of(alone, expected)
    for _ in range(2):
        alone.update_multi_precision([1], expected, [values(2, 4, dtype=dtype)], expected_states)
    assert torch.equal(weights[1], expected[0])


@EVERY
@BOTH_PATHS
def test_zero_dimensional_weights(name: str, fused: bool) -> None:
    opt, flat = create(name, fused), create(name, fused)
    weight, expected = [torch.tensor(0.75)], [torch.tensor([0.75])]
    state, expected_state = states_of(opt, weight), states_of(flat, expected)
    for _ in range(2):
        opt.update([0], weight, [torch.tensor(0.5)], state)
        flat.update([0], expected, [torch.tensor([0.5])], expected_state)
    assert weight[0].shape == ()
    assert torch.equal(weight[0], expected[0][0])
    assert weight[0] != 0.75


@EVERY
@BOTH_PATHS
@pytest.mark.parametrize("multi_precision", [False, True])
def test_gradients_are_never_modified(name: str, fused: bool, multi_precision: bool) -> None:
    opt = create(name, fused, wd=0.1, rescale_grad=0.5, clip_gradient=0.3, multi_precision=multi_precision)
    weights = [values(0, 6), values(1, 2, 3, dtype=torch.float16), values(2, 6)]
    grads = [values(3, 6), values(4, 3, 2, dtype=torch.float16).t(), values(5, 12)[::2]]
    before = [grad.clone() for grad in grads]
    opt.update_multi_precision([0, 1, 2], weights, grads, states_of(opt, weights))
    assert all(map(torch.equal, grads, before))


@EVERY
@BOTH_PATHS
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("rescale", [math.nan, math.inf, -math.inf, 0.0], ids=str)
def test_rescale_that_skips(name: str, fused: bool, rescale: float, as_tensor: bool) -> None:
    opt = create(name, fused, wd=0.1, multi_precision=True)
    weights = [values(0, 4), values(1, 4, dtype=torch.float16)]
    states = states_of(opt, weights)
    train(opt, weights, states, [0])
    before, states_before = copy.deepcopy((weights, states))
    opt.rescale_grad = torch.tensor(rescale) if as_tensor else rescale
    train(opt, weights, states, [1])
    # An update with a zero gradient still decays, except where MXNet's op skips it.
    skipped = rescale != 0 or name == "adamw"
    for after, was in zip(weights, before, strict=True):
        assert torch.equal(after, was) == skipped
    if skipped:
        assert all(map(torch.equal, flatten(states), flatten(states_before)))
    assert opt._index_update_count == {0: 2, 1: 2}
    assert opt.num_update == 2
    assert all(tensor.isfinite().all() for tensor in (*weights, *flatten(states)))


@EVERY
@BOTH_PATHS
def test_rescale_of_one_element_is_a_number(name: str, fused: bool) -> None:
    results = []
    for rescale in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        opt, weights = create(name, fused, rescale_grad=rescale), [values(0, 5)]
        train(opt, weights, states_of(opt, weights), range(2))
        results.append(weights[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@EVERY
@BOTH_PATHS
@pytest.mark.parametrize("off", [0, -1.0])
@pytest.mark.parametrize("later", [False, True], ids=["constructed", "assigned"])
def test_clip_of_zero_or_less_is_off(name: str, fused: bool, off: float, later: bool) -> None:
    plain, opt = create(name, fused), create(name, fused, clip_gradient=None if later else off)
    if later:
        opt.clip_gradient = off
    weights, expected = [values(0, 5)], [values(0, 5)]
    train(opt, weights, states_of(opt, weights), range(2))
    train(plain, expected, states_of(plain, expected), range(2))
    assert torch.equal(weights[0], expected[0])


@BOTH_PATHS
@pytest.mark.parametrize("off", [0, -1.0])
@pytest.mark.parametrize("bound", ["lower_bound", "upper_bound"])
@pytest.mark.parametrize("later", [False, True], ids=["constructed", "assigned"])
def test_bound_of_zero_or_less_is_unset(fused: bool, off: float, bound: str, later: bool) -> None:
    plain, opt = create("lamb", fused), create("lamb", fused, **{bound: None if later else off})
    if later:
        setattr(opt, bound, off)
    weights, expected = [values(0, 5)], [values(0, 5)]
    train(opt, weights, states_of(opt, weights), range(2))
    train(plain, expected, states_of(plain, expected), range(2))
    assert torch.equal(weights[0], expected[0])


@BOTH_PATHS
@pytest.mark.parametrize("bound", [math.inf, 1e300])
def test_a_clip_that_no_gradient_reaches(fused: bool, bound: float) -> None:
    opt, weight = (
        tritopt.SGD(learning_rate=1.0, clip_gradient=bound, use_fused_step=fused),
        torch.zeros(2),
    )
    opt.update(0, weight, torch.full((2,), 3.0), None)
    assert weight.tolist() == [-3.0, -3.0]


@BOTH_PATHS
def test_clip_applies_to_the_rescaled_gradient_and_not_to_the_decay(fused: bool) -> None:
    opt = tritopt.SGD(learning_rate=1.0, wd=0.5, rescale_grad=0.5, clip_gradient=1.0, use_fused_step=fused)
    weight = torch.full((3,), 8.0)
    opt.update(0, weight, torch.tensor([1.0, 4.0, -4.0]), None)
    assert weight.tolist() == [8 - 0.5 - 4, 8 - 1 - 4, 8 + 1 - 4]


@BOTH_PATHS
def test_test_never_clips(fused: bool) -> None:
    opt, weight = (
        tritopt.Test(learning_rate=1.0, clip_gradient=0.5, use_fused_step=fused),
        torch.zeros(2),
    )
    opt.update(0, weight, torch.full((2,), 3.0), torch.zeros(2))
    assert weight.tolist() == [-3.0, -3.0]


@EVERY
@BOTH_PATHS
def test_a_learning_rate_of_zero_leaves_the_weight(name: str, fused: bool) -> None:
    opt = create(name, fused, learning_rate=0.0, wd=0.1, multi_precision=True)
    weights = [values(0, 5), values(1, 5, dtype=torch.bfloat16)]
    before = [weight.clone() for weight in weights]
    train(opt, weights, states_of(opt, weights), range(2))
    assert all(map(torch.equal, weights, before))
    assert opt.num_update == 2


@EVERY
@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_zero_weights_and_gradients_stay_finite(name: str, fused: bool, dtype: torch.dtype) -> None:
    # fp16 arithmetic would round epsilon=1e-8 to 0; LAMB's norms are 0.
    opt = create(name, fused)
    weights = [torch.zeros(4, dtype=dtype), values(1, 4, dtype=dtype)]
    opt.update([0, 1], weights, [torch.zeros_like(weight) for weight in weights], states_of(opt, weights))
    assert weights[0].tolist() == [0.0] * 4
    assert torch.equal(weights[1], values(1, 4, dtype=dtype))


# Autograd.


@EVERY
@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_leaf_parameters_are_updated_in_place(name: str, fused: bool, dtype: torch.dtype) -> None:
    opt, plain = create(name, fused, multi_precision=True), create(name, fused, multi_precision=True)
    parameter = nn.Parameter(values(0, 2, 3, dtype=dtype))
    address = parameter.data_ptr()
    states = states_of(opt, [parameter])
    for _ in range(2):
        grads = torch.autograd.grad((parameter.float() ** 2).sum(), parameter)
        opt.update_multi_precision([0], [parameter], grads, states)
    assert parameter.data_ptr() == address
    assert parameter.is_leaf
    assert parameter.requires_grad

    expected = values(0, 2, 3, dtype=dtype)
    expected_states = states_of(plain, [expected])
    for _ in range(2):
        grad = (2 * expected.float()).to(dtype)
        plain.update_multi_precision([0], [expected], [grad], expected_states)
    assert torch.equal(parameter.detach(), expected)


@EVERY
@BOTH_PATHS
def test_gradients_that_require_grad(name: str, fused: bool) -> None:
    opt, parameter = create(name, fused), nn.Parameter(values(0, 3))
    (grad,) = torch.autograd.grad((parameter**3).sum(), parameter, create_graph=True)
    opt.update([0], [parameter], [grad], states_of(opt, [parameter]))
    assert not torch.equal(parameter.detach(), values(0, 3))


@EVERY
@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autograd_notices_the_update(name: str, fused: bool, dtype: torch.dtype) -> None:
    # A graph recorded before the step must not be differentiated at the weights after it without a word.
    opt, parameter = create(name, fused, multi_precision=True), nn.Parameter(values(0, 3, dtype=dtype))
    loss = (parameter**2).sum()
    opt.update_multi_precision([0], [parameter], [values(1, 3, dtype=dtype)], states_of(opt, [parameter]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, parameter)


@BOTH_PATHS
def test_hyperparameters_may_be_assigned_between_steps(fused: bool) -> None:
    """A new value counts for every parameter, also where count and rate are as before."""
    opt = tritopt.SGD(learning_rate=1.0, momentum=0.5, use_fused_step=fused)
    weights = [torch.zeros(2), torch.zeros(2)]
    states = states_of(opt, weights)
    opt.update([0], weights[:1], [torch.ones(2)], states[:1])
    opt.momentum = 0.25
    for index in (1, 1):
        opt.update([index], weights[1:], [torch.ones(2)], states[1:])
    assert weights[1].tolist() == [-2.25, -2.25]


class Named:
    """Something that a user mixes in."""


class Mixed(Named, tritopt.SGD):
    pass


def test_a_class_that_mixes_something_in_is_its_own_rule() -> None:
    assert Mixed.rule is Mixed
    assert Mixed(0.5, momentum=0.9).momentum == 0.9
