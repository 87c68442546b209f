"""Learning-rate schedules: functions of the number of updates made so far, with an optional warm-up in front.

Rates are per update and `num_update` counts updates, not epochs or samples; the first update of a run evaluates the
schedule at 1. As in MXNet the schedules are stateful: what a call has decayed stays decayed, and an earlier
`num_update` asked for later does not bring the higher rate back.
"""

from __future__ import annotations

import math
import warnings

from tritopt.engine.validate import nonnegative, number


def _integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}; convert it with int()")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return value


def _factor(value: float) -> float:
    if number("factor", value) > 1:
        raise ValueError(f"factor={value!r} must be at most 1: the learning rate is multiplied by it")
    return float(value)


class LRScheduler:
    """Base of all schedules: the current rate `base_lr` and the warm-up.

        linear     lr(n) = warmup_begin_lr + (warmup_final_lr - warmup_begin_lr) n / warmup_steps    n < warmup_steps
        constant   lr(n) = warmup_begin_lr                                                           n < warmup_steps

    `warmup_final_lr` is the `base_lr` given here and stays so: an optimizer that is also given a `learning_rate`
    overwrites `base_lr`, but the warm-up still heads for the old one. Factor and MultiFactor count updates from 0, not
    from the end of the warm-up. A subclass defines `after_warmup`, or all of `__call__`.

    Raises TypeError for a value of the wrong type, and ValueError for a `base_lr` that is negative or not finite, a
    `warmup_begin_lr` above `base_lr`, negative `warmup_steps` and an unknown `warmup_mode`.

    >>> LRScheduler(base_lr=1.0, warmup_steps=4, warmup_begin_lr=0.5).get_warmup_lr(2)
    0.75
    """

    def __init__(
        self, base_lr: float = 0.01, warmup_steps: int = 0, warmup_begin_lr: float = 0, warmup_mode: str = "linear"
    ) -> None:
        self.base_lr = float(nonnegative("base_lr", base_lr))
        self.warmup_final_lr = self.base_lr
        self.warmup_steps = _integer("warmup_steps", warmup_steps, 0)
        self.warmup_begin_lr = float(number("warmup_begin_lr", warmup_begin_lr))
        self.warmup_mode = warmup_mode
        if warmup_begin_lr > base_lr:
            raise ValueError(f"warmup_begin_lr={warmup_begin_lr!r} must not exceed base_lr={base_lr!r}")
        if warmup_mode not in ("linear", "constant"):
            raise ValueError(f"warmup_mode={warmup_mode!r} must be 'linear' or 'constant'")

    def get_warmup_lr(self, num_update: int) -> float:
        """Rate during the warm-up; ValueError if `num_update` is not below `warmup_steps`."""
        if num_update >= self.warmup_steps:
            raise ValueError(
                f"num_update={num_update} is not in the warm-up, which has warmup_steps={self.warmup_steps}"
            )
        if self.warmup_mode == "constant":
            return self.warmup_begin_lr
        increase = self.warmup_final_lr - self.warmup_begin_lr
        return self.warmup_begin_lr + increase * num_update / self.warmup_steps

    def after_warmup(self, num_update: int) -> float:
        """Rate at `num_update`, not below `warmup_steps`; NotImplementedError in the base class."""
        raise NotImplementedError(f"{type(self).__name__} must define after_warmup(num_update)")

    def __call__(self, num_update: int) -> float:
        """Learning rate of update number `num_update`."""
        return self.get_warmup_lr(num_update) if num_update < self.warmup_steps else self.after_warmup(num_update)


class FactorScheduler(LRScheduler):
    """Decay by `factor` every `step` updates, down to `stop_factor_lr`.

        lr(n) = max(base_lr factor^k, stop_factor_lr),    k = floor((n - 1) / step)

    MXNet's documentation has the exponent floor(n / step); its code, and this, decay one update later. The floor
    applies when the rate decays: a `base_lr` below it is used for the first `step` updates.

    Raises ValueError for `step` < 1 and `factor` > 1.

    >>> schedule = FactorScheduler(step=2, factor=0.5, base_lr=1.0)
    >>> [schedule(n) for n in (1, 2, 3, 4, 5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    def __init__(
        self,
        step: int,
        factor: float = 1,
        stop_factor_lr: float = 1e-8,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        self.step = _integer("step", step, 1)
        self.factor = _factor(factor)
        self.stop_factor_lr = float(number("stop_factor_lr", stop_factor_lr))
        self.count = 0

    def after_warmup(self, num_update: int) -> float:
        """Rate at `num_update`; remembers the decays made."""
        while num_update > self.count + self.step:
            self.count += self.step
            self.base_lr = max(self.base_lr * self.factor, self.stop_factor_lr)
        return self.base_lr


class MultiFactorScheduler(LRScheduler):
    """Decay by `factor` after each of the updates listed in `step`.

        lr(n) = base_lr factor^k,    k = number of entries of step below n

    Strictly below: update `step[i]` itself still has the old rate. MXNet's documentation says otherwise, its code not.

    Raises TypeError unless `step` is a list of ints, and ValueError if it is empty or not strictly increasing, for an
    entry < 1 and for `factor` > 1.

    >>> schedule = MultiFactorScheduler(step=[2, 4], factor=0.5, base_lr=1.0)
    >>> [schedule(n) for n in (1, 2, 3, 4, 5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    def __init__(
        self,
        step: list[int],
        factor: float = 1,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        if not isinstance(step, list):
            raise TypeError(f"step={step!r} must be a list of update numbers, not {type(step).__name__}")
        if not step:
            raise ValueError("step=[] must name at least one update; for a constant rate use FactorScheduler(step=1)")
        self.step = [_integer(f"step[{i}]", update, 1) for i, update in enumerate(step)]
        if step != sorted(set(step)):
            raise ValueError(f"step={step!r} must be strictly increasing")
        self.factor = _factor(factor)
        self.cur_step_ind = 0

    def after_warmup(self, num_update: int) -> float:
        """Rate at `num_update`; remembers the decays made."""
        while self.cur_step_ind < len(self.step) and num_update > self.step[self.cur_step_ind]:
            self.cur_step_ind += 1
            self.base_lr *= self.factor
        return self.base_lr


class _AnnealingScheduler(LRScheduler):
    """Rate from `base_lr_orig` at the end of the warm-up along `remaining` to `final_lr` at `max_update`."""

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        final_lr: float = 0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        self.base_lr_orig = self.base_lr
        self.final_lr = float(number("final_lr", final_lr))
        self.max_update = _integer("max_update", max_update, 1)
        self.max_steps = max_update - warmup_steps
        if self.max_steps == 0:
            raise ValueError(f"max_update={max_update} must differ from warmup_steps: it leaves no update to decay in")
        self.tail_is_known = False

    def remaining(self, progress: float) -> float:
        """Share of the way still to go, from 1 at `progress` 0 to 0 at `progress` 1."""
        raise NotImplementedError

    def after_warmup(self, num_update: int) -> float:
        """Rate at `num_update`; beyond `max_update` that of the last call in range."""
        if num_update <= self.max_update:
            share = self.remaining((num_update - self.warmup_steps) / self.max_steps)
            self.base_lr = self.final_lr + (self.base_lr_orig - self.final_lr) * share
        elif not self.tail_is_known:
            warnings.warn(
                f"{type(self).__name__} is first called at update {num_update}, beyond max_update={self.max_update}: "
                f"as in MXNet it returns base_lr={self.base_lr!r}, not final_lr={self.final_lr!r}. "
                "To resume a run, restore the pickled schedule, or call it with max_update first",
                stacklevel=3,
            )
        self.tail_is_known = True
        return self.base_lr


class PolyScheduler(_AnnealingScheduler):
    """Polynomial decay to `final_lr` at update `max_update`.

        lr(n) = final_lr + (base_lr - final_lr) (1 - (n - warmup_steps) / (max_update - warmup_steps))^pwr

    for warmup_steps <= n <= max_update, and after that what the last call in range returned. Where there was none, it
    is `base_lr`, with a UserWarning; MXNet is silent, and its documentation promises `final_lr`. An optimizer's
    `learning_rate` has no effect: each call in range starts from the `base_lr` given here.

    Raises TypeError if `max_update` is not an int, and ValueError if it is < 1 or equal to `warmup_steps` (MXNet: a
    ZeroDivisionError in the first call after the warm-up), and for `pwr` < 0.

    >>> schedule = PolyScheduler(max_update=4, base_lr=1.0)
    >>> [schedule(n) for n in (0, 2, 4, 9)]
    [1.0, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        pwr: float = 2,
        final_lr: float = 0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        self.power = float(nonnegative("pwr", pwr))

    def remaining(self, progress: float) -> float:
        """Share (1 - progress)^pwr of the way still to go."""
        return math.pow(1 - progress, self.power)


class CosineScheduler(_AnnealingScheduler):
    """Cosine decay to `final_lr` at update `max_update`; the rest is as in PolyScheduler.

        lr(n) = final_lr + (base_lr - final_lr) (1 + cos(pi (n - warmup_steps) / (max_update - warmup_steps))) / 2

    >>> schedule = CosineScheduler(max_update=4, base_lr=1.0, final_lr=0.5)
    >>> [round(schedule(n), 6) for n in (0, 2, 4, 9)]
    [1.0, 0.75, 0.5, 0.5]
    """

    def remaining(self, progress: float) -> float:
        """Share of the way still to go: half a cosine wave."""
        return (1 + math.cos(math.pi * progress)) / 2
