"""Parameters of a Trainer, out of modules, lists and dicts; chosen by pattern, and their attributes."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from tritopt.engine import private, validate
from tritopt.engine.names import Selector, is_pattern, matches, no_match, shown, uncompiled, unmatched
from tritopt.engine.warning import warn

Params: TypeAlias = (
    "nn.Module | Mapping[str, torch.Tensor] | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]]"
)
GRAD_REQS = ("write", "add", "null")
ATTRIBUTES = ("lr_mult", "wd_mult", "grad_req")


class Parameters(NamedTuple):
    """Each parameter once, in the given order."""

    tensors: list[torch.Tensor]
    names: list[str] | None
    """Name of each, the first of a tied one; None where they were given without names."""
    reduced_by: str | None
    """Module that sums up gradients over processes by itself; None: nobody does."""

    def label(self, index: int) -> str:
        """A parameter's name for a message, or else its index."""
        return f"`{self.names[index]}`" if self.names is not None else f"`{index}`"


class ParameterDict(dict[Any, torch.Tensor]):
    """Parameters by name, or by index where they have no names: what `Trainer.collect` returns."""

    def setattr(self, name: str, value: Any) -> None:
        """Set an attribute of each parameter, which a Trainer reads in every step.

        Args:
            name: "lr_mult" or "wd_mult", multipliers of the learning rate and the weight decay; or "grad_req", what
                becomes of gradients: "write" drops them in each step, "add" keeps them until zero_grad, so that
                backward adds to them, "null" leaves the parameter alone and drops them. Another word than before drops
                the gradient that is there, as in Gluon.
            value: a number >= 0 or one of these words.

        Raises:
            ValueError, TypeError: another name or value. Nothing is set then.
        """
        if name not in ATTRIBUTES:
            hint = validate.did_you_mean(name, list(ATTRIBUTES))
            raise ValueError(
                f"a Trainer reads no attribute {name!r} of parameters{hint} known: {', '.join(ATTRIBUTES)}"
            )
        if name == "grad_req":
            check_grad_req(value)
        else:
            validate.nonnegative(name, value)
        for param in self.values():
            if name == "grad_req" and (getattr(param, name, None) or GRAD_REQS[0]) != value:
                param.grad = None
            setattr(param, name, value)

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for param in self.values():
            param.grad = None


def check_grad_req(value: Any) -> None:
    """ValueError unless `value` is one of Gluon's words."""
    if value not in GRAD_REQS:
        raise ValueError(f"grad_req={value!r} must be one of {', '.join(map(repr, GRAD_REQS))}")


def collect(params: Parameters, selectors: Iterable[Selector], is_strict: bool) -> ParameterDict:
    """The parameters that any of these selects, all without one. `Trainer.collect` says more."""
    selectors = list(selectors)
    if params.names is None:
        if selectors:
            raise ValueError(
                f"{shown(selectors[0])} is matched with names, and this Trainer's parameters have none: construct it "
                "with a module, model.named_parameters(), or a dict by name"
            )
        return ParameterDict(enumerate(params.tensors))
    for selector in selectors:
        if not (isinstance(selector, str) or is_pattern(selector)):
            raise TypeError(f"{selector!r} selects no parameters: give a name, a pattern, or re.compile(...)")
    for selector in unmatched(selectors, params.names):
        message = no_match(selector, params.names)
        if is_strict:
            raise ValueError(message)
        warn(f"{message}; strict=True makes this an error")
    named = zip(params.names, params.tensors, strict=True)
    return ParameterDict(
        (name, param) for name, param in named if not selectors or any(matches(key, name) for key in selectors)
    )


def parameters_of(given: Any) -> Parameters:
    """The parameters of a Trainer's first argument. ValueError or TypeError for what it cannot optimize."""
    reduced_by = None
    if isinstance(given, nn.Module):
        reduced_by = _reducer(given)
        inner: Any = given.module if isinstance(given, nn.parallel.DistributedDataParallel) else given
        pairs = [(uncompiled(name), param) for name, param in inner.named_parameters()]
    elif isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, torch.Tensor | str) or not isinstance(given, Iterable):
        raise TypeError(
            f"params is a {type(given).__name__}: pass a module, a list of parameters or of (name, parameter) pairs, "
            "or a dict by name"
        )
    else:
        pairs = [one if isinstance(one, tuple) else (None, one) for one in given]
    seen: dict[int, tuple[Any, torch.Tensor]] = {}
    for i, pair in enumerate(pairs):
        _check(i, pair)
        seen.setdefault(id(pair[1]), pair)
    if not seen:
        raise ValueError(f"params has no parameters: {given!r:.80}")
    names = [name for name, _ in seen.values()]
    is_named = [name is not None for name in names]
    if any(is_named) and not all(is_named):
        raise TypeError(f"params[{is_named.index(False)}] has no name, and others have: name all of them, or none")
    if any(is_named) and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two parameters are called {twice!r}: give each a name of its own")
    return Parameters([param for _, param in seen.values()], names if all(is_named) else None, reduced_by)


def _reducer(module: nn.Module) -> str | None:
    for one in module.modules():
        if isinstance(one, nn.parallel.DistributedDataParallel):
            return "DistributedDataParallel"
        if type(one).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                "a Trainer takes no parameters of FullyShardedDataParallel: take an optimizer of tritopt.optim with "
                "fully_shard, or DistributedDataParallel"
            )
    return None


def refuse_ddp(params: Parameters) -> None:
    """RuntimeError if a DistributedDataParallel has any of the parameters: gradients would be summed up twice.

    It leaves no trace on parameters, so all objects are looked through, once for a Trainer and before its first sum.
    """
    owned = set(map(id, params.tensors))
    for one in gc.get_objects():
        if issubclass(type(one), nn.parallel.DistributedDataParallel) and owned & set(map(id, one.parameters())):
            raise RuntimeError(
                "DistributedDataParallel forms the mean of these gradients over processes: pass it to the Trainer, as "
                "Trainer(ddp_model, ...) and not its inner module or its parameters"
            )


def _check(place: int, pair: Any) -> None:
    if len(pair) != 2 or not (pair[0] is None or isinstance(pair[0], str)):
        raise TypeError(f"params[{place}] is {pair!r:.60}: a pair must be (name, parameter)")
    name, param = pair
    label = f"params[{place}]" if name is None else f"parameter {name!r}"
    if not isinstance(param, torch.Tensor):
        raise TypeError(f"{label} is {param!r:.60}, which is no parameter")
    if private.local_part(param) is not param:
        raise TypeError(
            f"{label} is a DTensor, of which this process has a part: a Trainer takes whole parameters; take an "
            "optimizer of tritopt.optim"
        )
    if not param.is_leaf:
        raise ValueError(f"{label} is the result of an operation: pass a leaf, such as an nn.Parameter")
    if param.dtype not in validate.WEIGHT_DTYPES:
        raise TypeError(f"{label} is {param.dtype}: a Trainer takes float16, bfloat16, float32 and float64 parameters")
