"""Names that users have for optimizers: registered ones, or classes in a module of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tritopt import optim
from tritopt.engine.validate import did_you_mean
from tritopt.mxnet import registry
from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.registry import with_api


def registered(names: Sequence[str] | None = None) -> list[type[Optimizer]]:
    """Find the optimizers registered under these names (None: all); ValueError for an unknown one."""
    return [registry.find(name) for name in (registry.names() if names is None else names)]


def find_optimizers(names: Sequence[str]) -> list[type[Optimizer]]:
    """Find optimizers that users name, each once: as registered, or as "package.module:Class" (`load_optimizer`)."""
    return list(dict.fromkeys(load_optimizer(name) if ":" in name else _find(name) for name in names))


def _find(name: str) -> type[Optimizer]:
    try:
        return registry.find(name)
    except ValueError as error:
        raise ValueError(f"{error}; one of your own is named as in my_module:MyOptimizer") from error


def load_optimizer(target: str) -> type[Optimizer]:
    """Import and register the optimizer class that `target`, "package.module:Class", names; modules here come first.

    A class of the torch.optim face stands for its rule.

    Raises:
        ValueError: the target cannot be imported. TypeError: it is no subclass of `Optimizer`.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{target!r} must name a module and a class in it, as in my_module:MyOptimizer")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"cannot import module {module_name!r}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if _is_of(module, value)]
        raise ValueError(
            f"module {module_name!r} has no {name!r}{did_you_mean(name, known)} "
            f"its optimizers: {', '.join(known) or 'none'}"
        )
    cls: type[Optimizer] = getattr(module, name)
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
        cls = with_api(cls.rule) if hasattr(cls, "rule") else cls
    if not _is_optimizer(cls):
        raise TypeError(f"{target} is {cls!r:.80}, not a subclass of tritopt.Optimizer")
    return Optimizer.register(cls)


def _is_of(module: Any, value: Any) -> bool:
    """Whether it is an optimizer that a module defines, of either face."""
    is_of_torch = isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    return (is_of_torch or _is_optimizer(value)) and value.__module__ == module.__name__


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer)


def torch_classes() -> dict[str, type[optim.Optimizer]]:
    """Collect the optimizers of tritopt.optim, by name."""
    return {
        name: value
        for name, value in vars(optim).items()
        if isinstance(value, type) and issubclass(value, optim.Optimizer) and hasattr(value, "rule")
    }


def find_optimizer(name: str) -> type[optim.Optimizer]:
    """Find the class of tritopt.optim of this name, whatever the case; ValueError if there is none."""
    classes = {key.lower(): cls for key, cls in torch_classes().items()}
    if name.lower() not in classes:
        known = list(torch_classes())
        raise ValueError(f"unknown optimizer {name!r}{did_you_mean(name, known)} known: {', '.join(known)}")
    return classes[name.lower()]
