"""Learning rates, weight decays and update counts of parameters, as MXNet's optimizers keep them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tritopt.engine import validate
from tritopt.engine.launcher import Updates
from tritopt.engine.warning import warn
from tritopt.mxnet.multipliers import Factors, carried, check_names
from tritopt.rule import Rule

if TYPE_CHECKING:
    from tritopt.lr_scheduler import LRScheduler


class Rates(Rule):
    """A rule with a learning rate, a schedule, multipliers by index or name, and a count of updates per index."""

    lr: Any
    wd: float
    lr_scheduler: LRScheduler | None
    num_update: int
    lr_mult: dict[Any, float]
    wd_mult: dict[Any, float]
    idx2name: dict[Any, str]
    param_dict: Mapping[Any, Any]
    sym_info: tuple[Any, ...]
    _factors: dict[str, Factors]
    _all_index_update_counts: dict[Hashable, dict[Hashable, int]]
    _index_update_count: dict[Hashable, int]

    @property
    def learning_rate(self) -> float:
        """The learning rate before multipliers, per update; asks the scheduler if there is one."""
        return self.lr if self.lr_scheduler is None else self.lr_scheduler(self.num_update)

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate. Raises UserWarning, as MXNet does, if a scheduler decides it."""
        if self.lr_scheduler is not None:
            raise UserWarning(f"learning_rate={lr} has no effect beside an lr_scheduler; set lr_scheduler.base_lr")
        self.lr = validate.nonnegative("learning_rate", lr)

    def set_lr_mult(self, args_lr_mult: Mapping[Any, float], strict: bool = False) -> None:
        """Replace the multipliers of the learning rate, by index, name, or pattern of names.

        A pattern is a str with `*`, `?` or `[...]`, of the whole name as in `fnmatch`, or a compiled regular expression
        that is searched in it. An index comes before a name, a name before patterns, and of patterns the first in the
        given order. A name or pattern that matches no parameter is a warning, and with `strict` a ValueError; so is a
        pattern where parameters have no names.

        >>> import tritopt
        >>> opt = tritopt.create("sgd", learning_rate=1.0, param_idx2name={0: "fc.weight", 1: "fc.bias"})
        >>> opt.set_lr_mult({"*.bias": 2.0})
        >>> opt._get_lrs([0, 1])
        [1.0, 2.0]
        """
        check_names("lr_mult", args_lr_mult, self.idx2name, self.param_dict, strict)
        self.lr_mult = {**self._symbol_multipliers("__lr_mult__"), **args_lr_mult}

    def set_wd_mult(self, args_wd_mult: Mapping[Any, float], strict: bool = False) -> None:
        """Replace the multipliers of the weight decay; `set_lr_mult` says by what."""
        check_names("wd_mult", args_wd_mult, self.idx2name, self.param_dict, strict)
        self.wd_mult = {**self._symbol_multipliers("__wd_mult__"), **args_wd_mult}

    def _symbol_multipliers(self, attribute: str) -> dict[str, float]:
        if not self.sym_info:
            return {}
        attributes, arguments = self.sym_info
        return {name: float(attributes[name][attribute]) for name in arguments if attribute in attributes.get(name, {})}

    def _multiplied(self, value: float, indices: Sequence[Hashable], attribute: str) -> list[float]:
        multipliers: dict[Any, float] = getattr(self, attribute)
        if not (self.param_dict or multipliers):
            return [value] * len(indices)
        own = carried(list(map(self.param_dict.get, indices)), attribute) if self.param_dict else None
        if own is None and not multipliers:
            return [value] * len(indices)
        factors = self._factors[attribute].of(indices, multipliers, self.idx2name)
        if own is not None:
            factors = [factor if one is None else float(one) for factor, one in zip(factors, own, strict=True)]
        products = [value * factor for factor in factors]
        if not all(map(math.isfinite, products)):
            index, product = next((i, p) for i, p in zip(indices, products, strict=True) if not math.isfinite(p))
            raise ValueError(
                f"parameter {index!r}: {attribute} makes {value!r} into {product!r}; give a finite multiplier"
            )
        return products

    def _get_lrs(self, indices: Sequence[Hashable]) -> list[float]:
        """Learning rates of the parameters: one evaluation of the schedule, times their multipliers."""
        lr = self.learning_rate
        source = "" if self.lr_scheduler is None else f" from {self.lr_scheduler!r} at num_update={self.num_update}"
        validate.nonnegative(f"learning rate{source}", lr)
        return self._multiplied(lr, indices, "lr_mult")

    def _get_lr(self, index: Hashable) -> float:
        return self._get_lrs([index])[0]

    def _get_wds(self, indices: Sequence[Hashable]) -> list[float]:
        """Weight decays of the parameters, multipliers included."""
        validate.finite("wd", self.wd)
        return self._multiplied(self.wd, indices, "wd_mult")

    def _get_wd(self, index: Hashable) -> float:
        return self._get_wds([index])[0]

    def _set_current_device(self, device_id: Hashable) -> None:
        """Select the counts of a device; `num_update` is shared by all."""
        self._index_update_count = self._all_index_update_counts.setdefault(device_id, {})

    def _set_current_context(self, device_id: Hashable) -> None:
        warn("_set_current_context is now _set_current_device", DeprecationWarning)
        self._set_current_device(device_id)

    def _update_count(self, index: Hashable | list[Hashable] | tuple[Hashable, ...]) -> None:
        """Count one update of each index; one that is new starts from begin_num_update."""
        counts, indices = self._index_update_count, index if isinstance(index, list | tuple) else [index]
        old = [counts.get(i, self.begin_num_update) for i in indices]
        if old and old.count(old[0]) == len(old):
            new = dict.fromkeys(indices, old[0] + 1)
        else:
            new = {i: count + 1 for i, count in zip(indices, old, strict=True)}
        if len(new) == len(indices):
            counts.update(new)
        else:  # one that is there twice is updated twice
            for i in indices:
                counts[i] = counts.get(i, self.begin_num_update) + 1
            new = {i: counts[i] for i in indices}
        self.num_update = max(self.num_update, max(new.values(), default=0))

    @contextmanager
    def _counts_restored_on_error(self) -> Iterator[Updates[Hashable]]:
        """Keep counts as they were where the body fails, but for those of indices that were updated."""
        num_update, counts = self.num_update, dict(self._index_update_count)
        updates: Updates[Hashable] = Updates()
        try:
            yield updates
        except BaseException:
            updated = {index: self._index_update_count[index] for index in updates.written()}
            counts.update(updated)
            self.num_update = max([num_update, *updated.values()])
            self._index_update_count.clear()
            self._index_update_count.update(counts)
            self._forget_plans()
            raise

    def _forget_plans(self) -> None:
        """Drop what was derived for earlier steps, which may be half written."""


def initial_lr(learning_rate: float | None, lr_scheduler: LRScheduler | None) -> Any:
    """The learning rate that a constructor keeps; with a warning where it replaces the schedule's base."""
    if learning_rate is not None:
        learning_rate = validate.nonnegative("learning_rate", learning_rate)
    if lr_scheduler is None:
        return 0.01 if learning_rate is None else learning_rate
    if learning_rate is not None and getattr(lr_scheduler, "base_lr", learning_rate) != learning_rate:
        warn(
            f"learning_rate={learning_rate} replaces base_lr={lr_scheduler.base_lr} of {type(lr_scheduler).__name__}; "
            "pass learning_rate=None to keep the schedule's own base"
        )
        lr_scheduler.base_lr = learning_rate
    return learning_rate
