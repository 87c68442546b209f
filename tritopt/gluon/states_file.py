"""A Trainer's states on disk: a file that is whole at every moment, and checked before anything of it counts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritopt.engine.warning import warn
from tritopt.gluon.parameters import Parameters
from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.states import structure
from tritopt.mxnet.updater import Updater

FORMAT = "tritopt.Trainer"


def write(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write plain data so that `path` holds a whole file at every moment: the earlier one, or this.

    It is written under another name in the same folder, brought to the disk, and takes the name then.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            torch.save(dict(content), file)
            file.flush()
            # The new name could reach the disk before the content, and a power failure leave an empty file.
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too
        finally:
            os.close(folder)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write` has written, on the CPU and without running code. ValueError for any other file."""
    with open(path, "rb") as file:
        try:
            content = torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path}: not a whole file of Trainer.save_states(): {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a file of Trainer.save_states(), which says format={FORMAT!r}")
    return content


def shapes_of(params: Parameters) -> list[list[int]]:
    """Shapes of the parameters, as they are saved."""
    return [list(param.shape) for param in params.tensors]


def check_parameters(content: Mapping[str, Any], params: Parameters) -> None:
    """ValueError unless the states were saved of parameters of these names and shapes, in this order.

    Warns where only one of both has names: then only shapes tell parameters apart.
    """
    names, shapes = content["names"], content["shapes"]
    if (names is None) != (params.names is None):
        has, lacks = ("this Trainer's", "those that saved it") if names is None else ("the saved", "this Trainer's")
        warn(f"{has} parameters have names and {lacks} have none, so states are taken in order: check that")
    if len(shapes) != len(params.tensors):
        raise ValueError(f"it was saved for {len(shapes)} parameters, and this Trainer has {len(params.tensors)}")
    for i, (saved, shape) in enumerate(zip(shapes, shapes_of(params), strict=True)):
        if names is not None and params.names is not None and names[i] != params.names[i]:
            raise ValueError(f"parameter {i} is called {params.names[i]!r}, and was {names[i]!r} when it was saved")
        if list(saved) != shape:
            raise ValueError(f"parameter {params.label(i)} has shape {tuple(shape)}, and was saved as {tuple(saved)}")


def check_states(updater: Updater, params: Sequence[torch.Tensor]) -> None:
    """Bring states to their parameters' devices and formats. ValueError for those that do not belong there."""
    optimizer, states = updater.optimizer, updater.states
    indices = []
    for index in states:
        if not (type(index) is int and 0 <= index < len(params)):
            raise ValueError(f"it has a state of parameter {index!r}, and this Trainer has {len(params)} parameters")
        indices.append(index)
    weights = [params[i] for i in indices]
    updater.make_ready(indices, weights)
    own_states = [states[i] for i in indices]
    # As for an update, with gradients that fit.
    optimizer.check(indices, weights, [weight.detach() for weight in weights], own_states)
    if type(optimizer).step is not Optimizer.step or type(optimizer).fused_step is not Optimizer.fused_step:
        for i, weight, state in zip(indices, weights, own_states, strict=True):  # which `check` knows nothing of
            expected = optimizer.create_state_multi_precision(i, weight)
            if structure(state) != structure(expected):
                raise ValueError(f"parameter {i}: a state is {structure(state)}, and must be {structure(expected)}")
