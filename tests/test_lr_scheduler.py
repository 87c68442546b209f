import inspect
import json
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tritopt
from tests.support.golden_cases import BUNDLED
from tritopt.lr_scheduler import CosineScheduler, FactorScheduler, LRScheduler, MultiFactorScheduler, PolyScheduler

TABLES = json.loads((BUNDLED / "manifest.json").read_text())["lr_schedules"]
ANNEALING = (PolyScheduler, CosineScheduler)
SCHEDULES: list[Callable[[], LRScheduler]] = [
    lambda: FactorScheduler(step=3, factor=0.5, base_lr=1.0, warmup_steps=2),
    lambda: MultiFactorScheduler(step=[3, 5], factor=0.5, base_lr=1.0, warmup_steps=2),
    lambda: PolyScheduler(max_update=8, base_lr=1.0, final_lr=0.1, warmup_steps=2, warmup_begin_lr=0.2),
    lambda: CosineScheduler(max_update=8, base_lr=1.0, final_lr=0.1, warmup_steps=2, warmup_mode="constant"),
]

rates = st.floats(1e-6, 10)
factors = st.floats(0, 1)
updates = st.lists(st.integers(0, 200), min_size=1, max_size=20)


def table_id(table: dict[str, Any]) -> str:
    return f"{table['class']}-{table['sequence']}-{'-'.join(str(value) for value in table['kwargs'].values())}"


def is_beyond_range_at_first(schedule: LRScheduler, updates: list[int]) -> bool:
    decayed = [n for n in updates if n >= schedule.warmup_steps]
    return isinstance(schedule, ANNEALING) and bool(decayed) and decayed[0] > schedule.max_update


@pytest.mark.parametrize("table", TABLES, ids=table_id)
def test_tables_recorded_from_mxnet(table: dict[str, Any]) -> None:
    schedule = getattr(tritopt.lr_scheduler, table["class"])(**table["kwargs"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rates = [schedule(n) for n in table["num_update"]]
    assert rates == pytest.approx(table["lr"], rel=1e-12, abs=0)
    assert len(caught) == is_beyond_range_at_first(schedule, table["num_update"])


def test_there_are_tables_of_every_schedule_and_sequence() -> None:
    names = {"FactorScheduler", "MultiFactorScheduler", "PolyScheduler", "CosineScheduler"}
    sequences = {"walk", "jump", "back", "direct_beyond_end"}
    assert {(t["class"], t["sequence"]) for t in TABLES} == {(name, seq) for name in names for seq in sequences}


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [
        (LRScheduler, {"warmup_steps": 2.5}, TypeError, "warmup_steps=2.5 must be an int, not float"),
        (LRScheduler, {"warmup_steps": True}, TypeError, "warmup_steps=True must be an int, not bool"),
        (LRScheduler, {"warmup_steps": -1}, ValueError, "warmup_steps=-1 must be at least 0"),
        (LRScheduler, {"base_lr": 0.1, "warmup_begin_lr": 0.2}, ValueError, "warmup_begin_lr=0.2 must not exceed"),
        (LRScheduler, {"warmup_mode": "cosine"}, ValueError, "warmup_mode='cosine' must be 'linear' or 'constant'"),
        (LRScheduler, {"base_lr": math.nan}, ValueError, "base_lr=nan"),
        (LRScheduler, {"base_lr": -0.1}, ValueError, "base_lr=-0.1"),
        (LRScheduler, {"base_lr": "0.1"}, TypeError, "base_lr='0.1' must be a number"),
        (LRScheduler, {"warmup_begin_lr": math.nan}, ValueError, "warmup_begin_lr=nan"),
        (FactorScheduler, {"step": 0}, ValueError, "step=0 must be at least 1"),
        (FactorScheduler, {"step": 2.0}, TypeError, "step=2.0 must be an int"),
        (FactorScheduler, {"step": 1, "factor": 1.5}, ValueError, "factor=1.5 must be at most 1"),
        (FactorScheduler, {"step": 1, "factor": math.nan}, ValueError, "factor=nan"),
        (MultiFactorScheduler, {"step": (1, 2)}, TypeError, r"step=\(1, 2\) must be a list .*not tuple"),
        (MultiFactorScheduler, {"step": []}, ValueError, r"step=\[\] must name at least one update"),
        (MultiFactorScheduler, {"step": [0, 2]}, ValueError, r"step\[0\]=0 must be at least 1"),
        (MultiFactorScheduler, {"step": [2, 2]}, ValueError, r"step=\[2, 2\] must be strictly increasing"),
        (MultiFactorScheduler, {"step": [3, 2]}, ValueError, r"step=\[3, 2\] must be strictly increasing"),
        (MultiFactorScheduler, {"step": [1], "factor": 2}, ValueError, "factor=2 must be at most 1"),
        (PolyScheduler, {"max_update": 10.0}, TypeError, "max_update=10.0 must be an int, not float"),
        (PolyScheduler, {"max_update": True}, TypeError, "max_update=True must be an int, not bool"),
        (PolyScheduler, {"max_update": 0}, ValueError, "max_update=0 must be at least 1"),
        (PolyScheduler, {"max_update": 5, "warmup_steps": 5}, ValueError, "max_update=5 must differ from warmup_steps"),
        (PolyScheduler, {"max_update": 5, "pwr": -1}, ValueError, "pwr=-1"),
        (CosineScheduler, {"max_update": "5"}, TypeError, "max_update='5' must be an int, not str"),
        (CosineScheduler, {"max_update": 5, "warmup_steps": 5}, ValueError, "max_update=5 must differ"),
        (CosineScheduler, {"max_update": 5, "final_lr": math.nan}, ValueError, "final_lr=nan"),
    ],
)
def test_constructor_errors_carry_the_value(
    cls: Callable[..., LRScheduler], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cls(**arguments)


def test_the_base_class_has_only_a_warmup() -> None:
    with pytest.raises(NotImplementedError, match="LRScheduler must define after_warmup"):
        LRScheduler()(1)
    with pytest.raises(ValueError, match="num_update=3 is not in the warm-up, which has warmup_steps=3"):
        LRScheduler(warmup_steps=3).get_warmup_lr(3)


WARMUP = {"warmup_steps": 0, "warmup_begin_lr": 0, "warmup_mode": "linear"}
REQUIRED = inspect.Parameter.empty


@pytest.mark.parametrize(
    ("cls", "defaults"),
    [
        (LRScheduler, {"base_lr": 0.01, **WARMUP}),
        (FactorScheduler, {"step": REQUIRED, "factor": 1, "stop_factor_lr": 1e-8, "base_lr": 0.01, **WARMUP}),
        (MultiFactorScheduler, {"step": REQUIRED, "factor": 1, "base_lr": 0.01, **WARMUP}),
        (PolyScheduler, {"max_update": REQUIRED, "base_lr": 0.01, "pwr": 2, "final_lr": 0, **WARMUP}),
        (CosineScheduler, {"max_update": REQUIRED, "base_lr": 0.01, "final_lr": 0, **WARMUP}),
    ],
)
def test_arguments_have_mxnets_order_and_defaults(cls: Callable[..., LRScheduler], defaults: dict[str, Any]) -> None:
    arguments = [(name, parameter.default) for name, parameter in inspect.signature(cls).parameters.items()]
    assert arguments == list(defaults.items())


def test_positional_arguments_reach_their_attributes() -> None:
    poly = PolyScheduler(9, 0.2, 3, 0.1, 4, 0.05, "constant")
    assert (poly.base_lr, poly.power, poly.final_lr, poly.warmup_steps, poly.warmup_begin_lr) == (0.2, 3, 0.1, 4, 0.05)
    assert (poly.max_update, poly.base_lr_orig, poly.warmup_final_lr, poly.warmup_mode) == (9, 0.2, 0.2, "constant")


def test_step_list_of_the_caller_is_not_kept() -> None:
    steps = [2, 4]
    schedule = MultiFactorScheduler(steps, 0.5)
    steps.clear()
    assert schedule.step == [2, 4]


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("calls", [0, 1, 4, 12])
def test_pickled_schedule_continues_where_it_was(make: Callable[[], LRScheduler], calls: int) -> None:
    schedule = make()
    for n in range(calls):
        schedule(n)
    copy = pickle.loads(pickle.dumps(schedule))
    assert vars(copy) == vars(schedule)
    assert [copy(n) for n in range(calls, 20)] == [schedule(n) for n in range(calls, 20)]


@pytest.mark.parametrize("make", SCHEDULES)
def test_attributes_are_plain_data(make: Callable[[], LRScheduler]) -> None:
    schedule = make()
    schedule(4)
    assert {type(value) for value in vars(schedule).values()} <= {bool, int, float, str, list}


@pytest.mark.parametrize("cls", ANNEALING)
def test_first_call_beyond_the_end_returns_base_lr_and_warns_once(cls: type[PolyScheduler | CosineScheduler]) -> None:
    schedule = cls(max_update=10, base_lr=5.0, final_lr=0.5)
    with pytest.warns(
        UserWarning, match=r"first called at update 11, beyond max_update=10.*base_lr=5.0, not final_lr=0.5"
    ):
        assert schedule(11) == 5.0
    assert schedule(12) == 5.0
    assert schedule(10) == 0.5
    assert schedule(11) == 0.5


@pytest.mark.parametrize("cls", ANNEALING)
def test_training_to_the_end_leaves_final_lr_behind_silently(cls: type[PolyScheduler | CosineScheduler]) -> None:
    schedule = cls(max_update=10, base_lr=5.0, final_lr=0.5, warmup_steps=3)
    assert [schedule(n) for n in range(1, 15)][-5:] == [0.5] * 5


@pytest.mark.parametrize("cls", ANNEALING)
def test_warmup_alone_is_not_in_range(cls: type[PolyScheduler | CosineScheduler]) -> None:
    schedule = cls(max_update=10, base_lr=5.0, warmup_steps=3)
    schedule(2)
    with pytest.warns(UserWarning, match="first called at update 20"):
        assert schedule(20) == 5.0


def test_an_overwritten_base_lr_decays_but_the_warmup_heads_for_the_old_one() -> None:
    schedule = FactorScheduler(step=10, factor=0.5, base_lr=1.0, warmup_steps=4)
    schedule.base_lr = 3.0
    assert [schedule(n) for n in (1, 3, 4, 11)] == [0.25, 0.75, 3.0, 1.5]
    assert schedule.warmup_final_lr == 1.0


@pytest.mark.parametrize("cls", ANNEALING)
def test_annealing_ignores_an_overwritten_base_lr(cls: type[PolyScheduler | CosineScheduler]) -> None:
    schedule, untouched = cls(max_update=10, base_lr=5.0), cls(max_update=10, base_lr=5.0)
    schedule.base_lr = 0.3
    assert [schedule(n) for n in range(12)] == [untouched(n) for n in range(12)]


@pytest.mark.parametrize("cls", ANNEALING)
def test_max_update_within_the_warmup_leaves_base_lr(cls: type[PolyScheduler | CosineScheduler]) -> None:
    schedule = cls(max_update=2, base_lr=1.0, warmup_steps=4)
    assert schedule(3) == 0.75
    with pytest.warns(UserWarning, match="beyond max_update=2"):
        assert schedule(4) == 1.0


def test_decays_count_from_zero_not_from_the_end_of_the_warmup() -> None:
    schedule = FactorScheduler(step=10, factor=0.5, base_lr=1.0, warmup_steps=20)
    assert schedule(20) == 0.5


def test_a_subclass_defines_after_warmup_only() -> None:
    class Inverse(LRScheduler):
        def after_warmup(self, num_update: int) -> float:
            return self.base_lr / num_update

    schedule = Inverse(base_lr=1.0, warmup_steps=2)
    assert [schedule(n) for n in (0, 1, 2, 4)] == [0.0, 0.5, 0.5, 0.25]


@given(base_lr=rates, step=st.integers(1, 30), factor=factors, stop=st.floats(0, 1), updates=updates)
def test_factor_closed_form(base_lr: float, step: int, factor: float, stop: float, updates: list[int]) -> None:
    schedule = FactorScheduler(step, factor, stop, base_lr)
    for n in sorted(updates):
        decays = max(n - 1, 0) // step
        expected = max(base_lr * factor**decays, stop) if decays else base_lr
        assert schedule(n) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(
    base_lr=rates,
    step=st.sets(st.integers(1, 150), min_size=1, max_size=8).map(sorted),
    factor=factors,
    updates=updates,
)
def test_multifactor_closed_form(base_lr: float, step: list[int], factor: float, updates: list[int]) -> None:
    schedule = MultiFactorScheduler(step, factor, base_lr)
    for n in sorted(updates):
        assert schedule(n) == pytest.approx(base_lr * factor ** sum(s < n for s in step), rel=1e-9, abs=1e-300)


@given(
    base_lr=rates,
    final_lr=st.floats(0, 1),
    pwr=st.floats(0, 5),
    warmup_steps=st.integers(0, 40),
    length=st.integers(1, 150),
    updates=updates,
)
def test_annealing_closed_forms_in_any_order(
    base_lr: float, final_lr: float, pwr: float, warmup_steps: int, length: int, updates: list[int]
) -> None:
    end = warmup_steps + length
    poly = PolyScheduler(end, base_lr, pwr, final_lr, warmup_steps)
    cosine = CosineScheduler(end, base_lr, final_lr, warmup_steps)
    for n in [end, *updates]:
        if n < warmup_steps:
            assert poly(n) == cosine(n) == pytest.approx(base_lr * n / warmup_steps)
        elif n <= end:
            left = 1 - (n - warmup_steps) / length
            assert poly(n) == pytest.approx(final_lr + (base_lr - final_lr) * left**pwr, rel=1e-9)
            assert cosine(n) == pytest.approx(
                final_lr + (base_lr - final_lr) * math.sin(math.pi / 2 * left) ** 2, rel=1e-9, abs=1e-12
            )
        else:
            assert (poly(n), cosine(n)) == (poly.base_lr, cosine.base_lr)


@given(step=st.integers(1, 20), factor=factors, base_lr=rates, updates=updates)
def test_decays_are_not_taken_back(step: int, factor: float, base_lr: float, updates: list[int]) -> None:
    schedules: list[Callable[[], LRScheduler]] = [
        lambda: FactorScheduler(step, factor, 0, base_lr),
        lambda: MultiFactorScheduler([step, 2 * step, 5 * step], factor, base_lr),
    ]
    for make in schedules:
        walked = make()
        for i, n in enumerate(updates):
            assert walked(n) == pytest.approx(make()(max(updates[: i + 1])), rel=1e-9, abs=1e-300)
