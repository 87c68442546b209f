"""Gradient release: each parameter is updated as soon as its gradient is final, and the gradient is freed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from tritopt.engine import validate
from tritopt.optim.distributed import is_dtensor
from tritopt.optim.optimizer import Optimizer
from tritopt.optim.step.members import SingleParameter

_NAMED = 4  # parameters in an error's text
_lock = threading.Lock()  # autograd runs the hooks of each device in a thread of its own


def release_gradients(model_or_params: torch.nn.Module | Iterable[torch.Tensor], opt: Optimizer) -> GradientRelease:
    """Let `loss.backward()` update each parameter when its gradient is final, and free the gradient.

        release_gradients(model, opt)
        for batch in batches:
            loss(model, batch).backward()   # updates
            opt.step()                      # the rest, and the end of the iteration
            scheduler.step()

    So the gradients of all parameters never exist at once: memory for gradients falls from the model's size to about
    the largest layer's. Weights and states are bit for bit those of a step after backward. In exchange there is a
    launch per parameter and phase instead of one for all.

    `opt.step()` is called as ever: it updates parameters that still have a gradient (others than the ones given here,
    and gradients that were not made by backward), and tells one iteration from the next. Hooks of step run there, once,
    when released gradients are gone. Learning rates and other options are read when a parameter is updated. A parameter
    that is frozen now, or added to the optimizer later, waits for step. Gradients that several backward passes add up
    are right if only the last pass is inside a `with release_gradients(...)`.

    A hook of the parameter's own (`register_post_accumulate_grad_hook`) that was registered before sees its gradient,
    and may change it. What uses a parameter outside of its gradient's graph, as `weight.detach()` does, may come to its
    turn in backward after the update: autograd then raises, and such a parameter is to be left out here.

    Args:
        model_or_params: parameters to release, those with requires_grad=True. Tied ones count once.
        opt: an optimizer of `tritopt.optim` that has them all.

    Returns:
        A handle: `.remove()`, or the end of a `with` block, ends it.

    Raises:
        TypeError: neither a module nor tensors, or an optimizer of someone else's.
        ValueError: the optimizer lacks one of the parameters, two share memory, or one is released already.
        RuntimeError: one gradient is not enough to go by: max_grad_norm, differentiable=True, DistributedDataParallel,
            DTensor and FSDP. From `backward` also where a gradient arrives a second time before `opt.step()`. From
            `opt.step()` where it is torch.amp.GradScaler that calls it, after parameters were updated: before, nothing
            tells that the loss was scaled. An update that fails leaves its parameter and all that were to follow as
            they were, and their gradients in place.

    Source: Lv et al. 2023, arXiv:2306.09782 (LOMO); here with any optimizer.
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(
            f"release_gradients takes an optimizer of tritopt.optim, not a {type(opt).__qualname__} of "
            f"{type(opt).__module__}: take the class of that name there, if there is one"
        )
    _check_options(opt, opt.param_groups)
    named = _trainable(model_or_params)
    _check_known(named, opt)
    _check_not_distributed(named)
    released = {id(param) for handle in _active for param in handle.params}
    names = [name for name, param in named if id(param) in released]
    if names:
        raise ValueError(f"gradients of {_some(names)} are released already: remove() that handle first")
    validate.no_aliases([name for name, _ in named], [param for _, param in named])
    return GradientRelease([param for _, param in named], opt)


class GradientRelease:
    """Handle that `release_gradients` returns: `remove()` or the end of a `with` block ends the release."""

    def __init__(self, params: Sequence[torch.Tensor], opt: Optimizer) -> None:
        self.params = list(params)
        """Parameters that are updated in backward."""
        self._opt = opt
        self._done: set[int] = set()
        self._sizes: list[int] = []
        self._places: dict[int, tuple[int, int, int]] = {}
        self._is_checked = False
        # The optimizer owns this object. Parameters do not: Python would not find a cycle through their hooks.
        hook = _hook_of(weakref.ref(self))
        self._hooks: list[Any] = [param.register_post_accumulate_grad_hook(hook) for param in self.params]
        self._hooks.append(opt.register_step_pre_hook(self._before_step))
        self._hooks.append(opt.register_step_post_hook(self._after_step))
        _active.add(self)

    def remove(self) -> None:
        """End the release: gradients stay, and `opt.step()` updates."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _active.discard(self)

    def __enter__(self) -> GradientRelease:
        """Return the handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the release, as `remove` does."""
        self.remove()

    def update(self, param: torch.Tensor) -> None:
        """Update a parameter whose gradient is final."""
        with _lock:
            if param.grad is None:  # a hook that ran before has taken it
                return
            single = self._single(param)
            if id(param) in self._done:
                raise RuntimeError(
                    f"the gradient of parameter {single.name!r} was released, and arrives a second time before "
                    "opt.step(): call opt.step() after each backward; to add up gradients of several, use `with "
                    "release_gradients(...):` around the last one only"
                )
            _check_options(self._opt, [single.group])
            _check_unscaled(self._opt)
            if not self._is_checked:  # wrapped after release_gradients
                _check_not_distributed([(single.name, param)])
                self._is_checked = True
            self._opt._update(single)
            param.grad = None
            self._done.add(id(param))

    def _single(self, param: torch.Tensor) -> SingleParameter:
        groups = self._opt.param_groups
        sizes = [len(group["params"]) for group in groups]
        place = self._places.get(id(param))
        if sizes != self._sizes or place is None or groups[place[0]]["params"][place[1]] is not param:
            self._sizes, self._places = sizes, _places_in(self._opt)
            place = self._places.get(id(param))
        if place is None:
            raise RuntimeError(
                f"{type(self._opt).__name__} no longer has a parameter of shape {tuple(param.shape)} whose gradients "
                "are released: remove() the handle before taking parameters out"
            )
        group = groups[place[0]]
        return SingleParameter(place[2], _name_of(group, place[1], place[2]), param, group)

    def _before_step(self, opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._done:
            _check_unscaled(self._opt, ". Load a checkpoint: this iteration's updates took scaled gradients")

    def _after_step(self, opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._done.clear()


_active: weakref.WeakSet[GradientRelease] = weakref.WeakSet()


def _hook_of(owner: weakref.ref[GradientRelease]) -> Callable[[torch.Tensor], None]:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hook(param: torch.Tensor) -> None:
        release = owner()
        if release is not None:
            release.update(param)

    return hook  # type: ignore[no-any-return]


def _trainable(model_or_params: torch.nn.Module | Iterable[torch.Tensor]) -> list[tuple[Hashable, torch.Tensor]]:
    if isinstance(model_or_params, torch.nn.Module):
        pairs: list[tuple[Hashable, Any]] = list(model_or_params.named_parameters())
    elif isinstance(model_or_params, torch.Tensor) or not isinstance(model_or_params, Iterable):
        raise TypeError(f"release_gradients takes a module or a list of parameters, not {type(model_or_params)}")
    else:
        pairs = list(enumerate(model_or_params))
    for name, param in pairs:
        if not isinstance(param, torch.Tensor):
            raise TypeError(f"release_gradients takes a module or a list of parameters; {name!r} is {type(param)}")
    trainable = list({id(param): (name, param) for name, param in reversed(pairs) if param.requires_grad}.values())[
        ::-1
    ]
    if not trainable:
        raise ValueError("release_gradients: none of the parameters has requires_grad=True")
    return trainable


def _check_known(named: Sequence[tuple[Hashable, torch.Tensor]], opt: Optimizer) -> None:
    known = {id(param) for group in opt.param_groups for param in group["params"]}
    names = [name for name, param in named if id(param) not in known]
    if names:
        raise ValueError(
            f"{type(opt).__name__} does not have {_some(names)}: pass a list of the parameters that it has in place of "
            "the model, add the others by add_param_group, or freeze them by requires_grad_(False)"
        )


def _check_options(opt: Optimizer, groups: Iterable[dict[str, Any]]) -> None:
    if opt.max_grad_norm is not None:
        raise RuntimeError(
            f"max_grad_norm={opt.max_grad_norm} needs all gradients at once, which a release never has: take "
            "clip_value, which bounds elements, or do not release"
        )
    if opt.defaults.get("differentiable") or any(group.get("differentiable") for group in groups):
        raise RuntimeError("differentiable=True records the step, which a release runs inside backward: use opt.step()")


def _check_unscaled(opt: Optimizer, harm: str = "") -> None:
    for name in ("grad_scale", "found_inf"):
        if getattr(opt, name, None) is not None:
            raise RuntimeError(
                f"{type(opt).__name__} has {name}, as torch.amp.GradScaler sets it, but whether the scaled gradients "
                "overflow is known only when all are there, and a release updates before: train in bfloat16 without a "
                f"scaler, or remove() the release{harm}"
            )


def _check_not_distributed(named: Sequence[tuple[Hashable, torch.Tensor]]) -> None:
    for name, param in named:
        if is_dtensor(param):
            raise RuntimeError(
                f"parameter {name!r} is a DTensor (FSDP, tensor parallel), whose gradient may still be a pending sum "
                "over processes when autograd is done with it: use opt.step() after backward"
            )
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    wanted, wrappers = {id(param) for _, param in named}, (DistributedDataParallel, FullyShardedDataParallel)
    # A wrapper leaves no mark on the parameters, and the caller may well hold the module inside it. `type`, because
    # isinstance asks objects for their __class__, and some compute it.
    for module in gc.get_objects():
        if issubclass(type(module), wrappers) and any(id(param) in wanted for param in module.parameters()):
            raise RuntimeError(
                f"the parameters are in a {type(module).__name__}, which sums their gradients over processes after a "
                "release would have used them: use opt.step() after backward"
            )


def _places_in(opt: Optimizer) -> dict[int, tuple[int, int, int]]:
    """Group, place there and place among all of each parameter, by its id."""
    places = [(i, j, param) for i, group in enumerate(opt.param_groups) for j, param in enumerate(group["params"])]
    return {id(param): (i, j, position) for position, (i, j, param) in enumerate(places)}


def _name_of(group: dict[str, Any], place: int, position: int) -> Hashable:
    names = group.get("param_names")
    return names[place] if names else position


def _some(names: Sequence[Hashable]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"parameter{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:_NAMED]))}{more}"
