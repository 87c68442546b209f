"""Updater: keeps the states of an optimizer and applies it to lists of parameters."""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import islice
from types import NoneType
from typing import Any

import torch

from tritopt import lr_scheduler
from tritopt.engine import validate
from tritopt.mxnet import registry
from tritopt.mxnet.multipliers import packed, unpacked
from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.plain import require_plain

_OPTIMIZER = "optimizer"
_SCHEDULER = "lr_scheduler"
_MULTIPLIERS = ("lr_mult", "wd_mult")
_NOT_SAVED = (
    "_planner", "_known_scalars", "_index_update_count", "_tracker", "_sizes", "_checked", "_factors", "_clip",
    "_partition",
)  # fmt: skip


class Updater:
    """Callable `updater(index, grad, weight)`, in MXNet's order, with the states in `states`.

    A state is created when its index is first seen. With `aggregate_num` > 1 a list is grouped by weight dtype and
    updated `aggregate_num` tensors at a time (infinity: the whole list at once), otherwise one tensor at a time.

    Args:
        optimizer: the optimizer to apply.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.states: dict[Hashable, Any] = {}
        self.states_synced: dict[Hashable, bool] = {}

    @property
    def aggregate_updates(self) -> bool:
        """Whether a list is updated several tensors at a time."""
        return self.optimizer.aggregate_num > 1

    def __call__(self, index: Any, grad: Any, weight: Any) -> None:
        """Update one parameter, or parallel lists of them; errors as `Optimizer.update` has them.

        Byte strings in a list of indices are decoded in place.
        """
        if not isinstance(index, list | tuple):
            index, grad, weight = [index], [grad], [weight]
        validate.same_length(indices=index, gradients=grad, weights=weight)
        indices = list(index)
        if any(issubclass(cls, bytes) for cls in set(map(type, indices))):
            indices = [_decoded(i) for i in index]
            if isinstance(index, list):
                index[:] = indices
        lists = [indices, list(weight), list(grad)]
        if NoneType in set(map(type, grad)):
            active = [i for i, g in enumerate(grad) if g is not None]
            lists = [[items[i] for i in active] for items in lists]
        if lists[0]:
            self._update(*lists)

    def _update(self, indices: list[Any], weights: list[Any], grads: list[Any]) -> None:
        if not isinstance(weights[0], torch.Tensor):
            validate.weight_and_grad(indices[0], weights[0], grads[0])
        optimizer = self.optimizer
        optimizer._set_current_device(_device_id(weights[0]))
        n_known = len(self.states)
        try:
            lists = [indices, weights, grads, self._states_of(indices, weights, grads)]
            chunks = list(self._chunks(lists))
            if len(chunks) > 1 and not all(optimizer.repeats(*chunk) for chunk in chunks):
                # All of the call before any of its chunks, so that it is refused as a whole.
                optimizer.check(*lists)
            for chunk in chunks:
                optimizer.update_multi_precision(*chunk)
        except BaseException:
            for new in list(self.states)[n_known:]:  # a dict has what was added last at its end
                if new not in optimizer._index_update_count:
                    del self.states[new], self.states_synced[new]
            raise

    def _states_of(self, indices: list[Any], weights: list[Any], grads: list[Any]) -> list[Any]:
        """The states, made where they are missing and converted where they were loaded."""
        try:
            if all(map(self.states_synced.__getitem__, indices)):
                return list(map(self.states.__getitem__, indices))
        except (KeyError, TypeError):  # one that is new, or cannot be hashed
            pass
        for index, weight, grad in zip(indices, weights, grads, strict=True):
            validate.weight_and_grad(index, weight, grad)
        self.make_ready(indices, weights)
        return [self.states[index] for index in indices]

    def make_ready(self, indices: Sequence[Hashable], weights: Sequence[torch.Tensor]) -> None:
        """Create states that are missing, and bring loaded ones to their weights' devices and into their formats."""
        for index, weight in zip(indices, weights, strict=True):
            if index not in self.states:
                self.states[index] = self.optimizer.create_state_multi_precision(index, weight)
            elif not self.states_synced[index]:
                state = self.sync_state_context(self.states[index], weight.device)
                self.states[index] = self.optimizer.convert_state(index, weight, state)
            self.states_synced[index] = True

    def _chunks(self, lists: list[list[Any]]) -> Iterator[list[list[Any]]]:
        """The lists, whose second is the weights, as many at a time as are updated together."""
        size = validate.nonnegative_count("aggregate_num", self.optimizer.aggregate_num)
        if size == float("inf"):
            yield lists
            return
        by_dtype: dict[Any, list[int]] = {}
        for i, weight in enumerate(lists[1]):
            by_dtype.setdefault(weight.dtype if self.aggregate_updates else i, []).append(i)
        for positions in by_dtype.values():
            rest = iter(positions)
            while chunk := list(islice(rest, max(1, int(size)))):
                yield [[items[i] for i in chunk] for items in lists]

    def sync_state_context(self, state: Any, device: torch.device) -> Any:
        """`state` on `device`; tuples and lists keep their type."""
        if isinstance(state, torch.Tensor):
            return state.to(device)
        if isinstance(state, tuple | list):
            return type(state)(self.sync_state_context(item, device) for item in state)
        return state

    def get_states(self, dump_optimizer: bool = False) -> bytes:
        """The states, and on demand the optimizer, as bytes of `torch.save` that hold plain data only.

        Raises TypeError if a state, an index or an attribute of the optimizer is not a number, a string, a tensor, a
        dtype of torch or a dict, list or tuple of these.
        """
        buffer = io.BytesIO()
        torch.save(self.content(dump_optimizer), buffer)
        return buffer.getvalue()

    def content(self, dump_optimizer: bool = False) -> dict[str, Any]:
        """Plain data that `get_states` turns into bytes: the states themselves and no copies."""
        require_plain(self.states, "the states")
        content: dict[str, Any] = {"states": self.states}
        if dump_optimizer:
            content[_OPTIMIZER] = _pack_optimizer(self.optimizer)
        return content

    def take(self, content: Mapping[str, Any]) -> None:
        """Take over what `content` gave; `set_states` says more. Errors are of any kind, and change nothing."""
        loaded = dict(content["states"])
        self.optimizer = _unpack_optimizer(content[_OPTIMIZER]) if _OPTIMIZER in content else self.optimizer
        self.states = loaded
        self.states_synced = dict.fromkeys(loaded, False)

    def set_states(self, states: bytes) -> None:
        """Take over what `get_states` gave; a dumped optimizer replaces this one, with an empty `param_dict`.

        States of another `master` are converted when their weight is next updated (`Optimizer.convert_state`).
        The bytes are read with `weights_only=True`: they cannot run code. Raises ValueError if they hold anything else.
        """
        try:
            self.take(torch.load(io.BytesIO(states), weights_only=True, map_location="cpu"))
        except Exception as error:
            raise ValueError(
                f"these bytes do not come from Updater.get_states(): {error}; pass what it gave"
            ) from error


def get_updater(optimizer: Optimizer) -> Updater:
    """An Updater of `optimizer`."""
    return Updater(optimizer)


def _decoded(index: Any) -> Any:
    return index.decode("utf-8") if isinstance(index, bytes) else index


def _device_id(weight: torch.Tensor) -> int:
    return weight.device.index or 0


def _pack_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    attributes = optimizer.__getstate__()
    for name in _NOT_SAVED:
        del attributes[name]
    attributes.update({name: packed(attributes[name]) for name in _MULTIPLIERS})
    device = next(d for d, c in optimizer._all_index_update_counts.items() if c is optimizer._index_update_count)
    schedule, name = attributes.pop(_SCHEDULER), type(optimizer).__name__.lower()
    if registry.registered().get(name) is not type(optimizer):
        raise TypeError(f"{type(optimizer)!r} is not what {name!r} brings back; register it to dump it")
    saved: dict[str, Any] = {"name": name, "attributes": attributes, "device": device}
    if schedule is not None:
        if _scheduler_classes().get(type(schedule).__name__) is not type(schedule):
            raise TypeError(
                f"lr_scheduler={schedule!r} is not what {type(schedule).__name__!r} brings back; rename "
                "its class, or call get_states(dump_optimizer=False)"
            )
        saved[_SCHEDULER] = {"class": type(schedule).__name__, "attributes": schedule.__dict__}
    require_plain(saved, type(optimizer).__name__)
    return saved


def _unpack_optimizer(saved: dict[str, Any]) -> Optimizer:
    if not isinstance(saved["attributes"], dict):
        raise TypeError(f"its attributes are {saved['attributes']!r:.60}")
    optimizer = object.__new__(registry.find(saved["name"]))
    Optimizer.__init__(optimizer)
    optimizer.__setstate__(saved["attributes"])
    for multipliers in _MULTIPLIERS:
        setattr(optimizer, multipliers, unpacked(getattr(optimizer, multipliers)))
    optimizer._set_current_device(saved["device"])
    optimizer.lr_scheduler = None
    if _SCHEDULER in saved:
        name = saved[_SCHEDULER]["class"]
        if name not in _scheduler_classes():
            raise ValueError(f"it has an lr_scheduler of class {name!r}; import or define that class first")
        schedule = optimizer.lr_scheduler = object.__new__(_scheduler_classes()[name])
        schedule.__dict__.update(saved[_SCHEDULER]["attributes"])
    return optimizer


def _scheduler_classes() -> dict[str, type[lr_scheduler.LRScheduler]]:
    """LRScheduler and its subclasses by name; the nearest to the base has the name that several share."""
    classes: dict[str, type[lr_scheduler.LRScheduler]] = {}
    level = [lr_scheduler.LRScheduler]
    while level:
        for cls in level:
            classes.setdefault(cls.__name__, cls)
        level = [subclass for cls in level for subclass in cls.__subclasses__()]
    return classes
