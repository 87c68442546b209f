"""Questions that a replayed step asks of every tensor of a list: whether it is the one it was, and where it lies.

In Python a step of 400 parameters with their gradients and states takes 1.6 to 3.5 ms for these questions, longer than
torch's own fused step. tritopt/engine/walk.c asks the same in C, in 15 to 70 ns a tensor, through torch's interfaces
for compiled code. It is installed with tritopt where there was a compiler (setup.py). Otherwise Triton builds it, as it
builds its own launchers, when it is first needed, and keeps it in its cache on disk. Where that fails too, for want of
a C compiler or of one of torch's interfaces, the functions below do the same, slower, and a warning says so.
`TRITOPT_WALK=python` insists on them. `tritopt check` says which walk runs.
"""

from __future__ import annotations

import hashlib
import importlib
import operator
import os
import sysconfig
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from tritopt.engine import private
from tritopt.engine.group import Array
from tritopt.engine.warning import warn_once
from tritopt.kernels.language import HAS_TRITON


class Walk(Protocol):
    """Questions about tensors, states and param_groups, answered in C or in Python."""

    def are(self, tensors: list[torch.Tensor], said: Any, addresses: Array) -> bool:
        """Whether `describe` says this of them, and that is where they lie, int64 [tensors]."""
        ...

    def describe(self, tensors: list[Any], out: Array, n_words: int) -> Hashable | None:
        """Addresses of tensors, -1 for None; returns what says their dtypes, shapes and strides.

        None if one is not strided, or negated or zero by a bit, or if they have not `n_words` in all (`n_words`).
        """
        ...

    def gradients_are(self, params: list[torch.Tensor], said: Any, out: Array) -> bool:
        """Whether `describe` says this of their gradients; their addresses."""
        ...

    def mark_written(self, tensors: list[torch.Tensor]) -> None:
        """Tell autograd of writes that it did not make. Tensors of inference mode have no version."""
        ...

    def same(self, a: list[Any], b: list[Any]) -> bool:
        """Whether these are the same objects."""
        ...

    def hold(self, lists: list[list[Any]], copies: list[list[Any]]) -> bool:
        """Whether these are lists, and each holds the very objects of its copy."""
        ...

    def changed(self, dicts: list[dict[Any, Any]], before: list[tuple[Any, ...]]) -> list[int]:
        """Places of the dicts whose keys and values, in turn, are not the objects that they were before."""
        ...

    def states_are(self, states: dict[Any, dict[str, Any]], owners: list[Any], said: Any, table: Array) -> bool:
        """Whether these are the owners and dicts of `known_states`, in order, their values as and where they were."""
        ...


def n_words(tensors: list[Any]) -> int:
    """Number of words with which `Walk.describe` describes these."""
    return sum(2 + 2 * (0 if tensor is None else tensor.dim()) for tensor in tensors)


def known_states(walk: Walk, states: dict[Any, dict[str, Any]]) -> tuple[list[Any], Any, Array]:
    """Record for `Walk.states_are`. It holds no state alive: whoever replaces one wants its memory back.

    Returns the owners of the states, what is said of the tensors, and rows, int64 [dicts and values, 4]: for each dict
    its identity, the number of its values, where in words the description of its tensors begins, and 0; then for each
    value its identity, its key's, its tensor's address, -1 where there is none, and its tensor's implementation.
    """
    rows: list[tuple[int, int, int, int]] = []
    parts: list[torch.Tensor] = []
    places: list[int] = []
    n = 0
    for state in states.values():
        rows.append((id(state), len(state), n, 0))
        for name, value in state.items():
            part = _with_memory(value)
            rows.append((id(value), id(name), -1, 0 if part is None else private.implementation_of(part)))
            if part is not None:
                places.append(len(rows) - 1)
                parts.append(part)
                n += n_words([part])
    table, addresses = np.array(rows, np.int64).reshape(-1, 4), np.zeros(len(parts), np.int64)
    said = walk.describe(parts, addresses, n)
    table[places, 2] = addresses
    return list(states), said, table


def _with_memory(value: Any) -> torch.Tensor | None:
    """The tensor that this process has of a value, if it is strided and has memory."""
    part = private.local_part(value)
    if not isinstance(part, torch.Tensor) or part.layout is not torch.strided:
        return None
    try:
        part.data_ptr()
    except RuntimeError:
        return None
    return part


def holds_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory holds its values: not where a bit says that they are negated, or that all are 0."""
    return not (tensor.is_neg() or private.is_zero_tensor(tensor))


def _states_are(states: dict[Any, dict[str, Any]], owners: list[Any], said: Any, table: Array) -> bool:
    if not _same(list(states), owners):
        return False
    parts, addresses = [], []
    known = iter(table.tolist())
    for state in states.values():
        if not isinstance(state, dict) or next(known)[:2] != [id(state), len(state)]:
            return False
        for name, value in state.items():
            identity, key, address, _ = next(known)
            if (key, identity) != (id(name), id(value)):
                return False
            if address != -1:
                parts.append(private.local_part(value))
                addresses.append(address)
    return next(known, None) is None and _are(parts, said, np.array(addresses, np.int64))


def _are(tensors: list[torch.Tensor], said: Any, addresses: Array) -> bool:
    now = np.empty(len(tensors), np.int64)
    return bool(_describe(tensors, now, n_words(tensors)) == said) and now.tolist() == addresses.tolist()


def _describe(tensors: list[Any], out: Array, n_words: int) -> Hashable | None:
    words: list[Any] = []
    for i, tensor in enumerate(tensors):
        if tensor is not None and not (tensor.layout is torch.strided and holds_values(tensor)):
            return None
        out[i] = -1 if tensor is None else tensor.data_ptr()
        words.append(None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride()))
    n = sum(2 + 2 * (0 if word is None else len(word[1])) for word in words)
    return tuple(words) if n == n_words else None


def _gradients_are(params: list[torch.Tensor], said: Any, out: Array) -> bool:
    grads = [param.grad for param in params]
    return bool(_describe(grads, out, n_words(grads)) == said)


def _mark_written(tensors: list[torch.Tensor]) -> None:
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _hold(lists: list[list[Any]], copies: list[list[Any]]) -> bool:
    return len(lists) == len(copies) and all(map(_same, lists, copies))


def _changed(dicts: list[dict[Any, Any]], before: list[tuple[Any, ...]]) -> list[int]:
    if len(dicts) != len(before):
        raise ValueError("as many dicts as tuples")
    now = [list(chain.from_iterable(group.items())) for group in dicts]
    return [i for i, (items, old) in enumerate(zip(now, before, strict=True)) if not _same(items, list(old))]


IN_PYTHON: Walk = SimpleNamespace(
    are=_are,
    states_are=_states_are,
    describe=_describe,
    gradients_are=_gradients_are,
    mark_written=_mark_written,
    same=_same,
    hold=_hold,
    changed=_changed,
)


@dataclass(frozen=True)
class Choice:
    """The walk of this process, and where it comes from."""

    walk: Walk
    origin: str
    """Language, and how it got here, for a reader."""
    complaint: str = ""
    """Reason why it is the slow one though nobody asked for that; "" if it is as it should be."""


MEANT = Choice(IN_PYTHON, "Python, as TRITOPT_WALK says")
_chosen: list[Choice] = []


def walk() -> Walk:
    """Return the walk of this process, in C if that can be had, which is asked for once."""
    return chosen().walk


def warn_if_slow() -> None:
    """Warn once of a walk in Python that nobody asked for: why it is that, and what to do."""
    choice = chosen()
    if choice.complaint:
        warn_once(
            choice,
            "tritopt asks in Python whether a step is like the last, which takes 1.5 ms for 400 tensors in place of "
            f"0.1: {choice.complaint}. Install a C compiler and Python's headers, or set TRITOPT_WALK=python to say "
            "that this is meant.",
        )


def chosen() -> Choice:
    """Return the walk of this process and where it comes from."""
    if not _chosen:
        _chosen.append(MEANT if os.environ.get("TRITOPT_WALK") == "python" else _choose())
    return _chosen[0]


def description() -> str:
    """Say for a reader which walk this process has."""
    choice = chosen()
    return f"{choice.origin}, slow: {choice.complaint}" if choice.complaint else choice.origin


def _choose() -> Choice:
    try:
        with ThreadPoolExecutor(1) as apart:
            # A new thread has none of torch's modes, under which a trial would fail: inference mode, FakeTensorMode.
            return apart.submit(in_c).result()
    except Exception as error:  # whatever a compiler, a loader, or another version of torch or Triton comes up with
        reason = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
        return Choice(IN_PYTHON, "Python", reason.strip().rstrip("."))


def in_c() -> Choice:
    """Return the walk in C: the extension that was installed, if it is of this source, or else built by Triton.

    Raises:
        RuntimeError: it can be neither found nor built, or is not right with this torch. Compilers and loaders raise
            errors of their own.
    """
    source = Path(__file__).with_name("walk.c").read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    try:
        made: Any = importlib.import_module("tritopt.engine._walk")
    except ImportError:
        made = None
    origin = "C, installed"
    if getattr(made, "source", None) != digest:
        origin = "C, built by Triton" + (", since what is installed is of another source" if made else "")
        made = _built(source.decode(), digest)
    _bind(made)
    return Choice(made, origin)


def _built(source: str, digest: str) -> Any:
    """Build it, or take it from Triton's cache."""
    if not HAS_TRITON:
        raise RuntimeError("the one in C is not installed, nor is Triton, which would build it")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise RuntimeError(f"the one in C is not installed, and cannot be built without {header}")
    made: Any = private.build(f'#define TRITOPT_WALK_SOURCE "{digest}"\n{source}', "_walk")
    if made.source != digest:
        raise RuntimeError("what was built in C is of another source")
    return made


def _bind(made: Any) -> None:
    """Give it torch's functions, and see that it is right. RuntimeError if it is not."""
    functions, strided = private.functions_of_tensors()
    made.bind(torch.Tensor, torch.nn.Parameter, tuple(functions), strided)
    tensors = [*(_empty(n).requires_grad_(n > 1) for n in range(4)), torch.nn.Parameter(_empty(1))]
    if list(map(made.implementation, tensors)) != list(map(private.implementation_of, tensors)):
        raise RuntimeError(f"torch {torch.__version__} keeps elsewhere what the one in C reads of a tensor")
    if not _agrees(made):
        raise RuntimeError(f"the one in C does not describe tensors of torch {torch.__version__} as Python does")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _agrees(made: Walk) -> bool:
    """Whether it says of some tensors and gradients what Python says, marks one, and refuses what it should."""
    tensors = [_empty(3, 5).t(), torch.nn.Parameter(_empty(2, dtype=torch.bfloat16)), _empty()]
    addresses, expected = np.zeros(3, np.int64), np.array([tensor.data_ptr() for tensor in tensors])
    said = made.describe(tensors, addresses, n_words(tensors))
    words = [x for t in tensors for x in (t.dim(), *t.shape, *t.stride())]
    numbers = np.frombuffer(said, np.int64).tolist() if isinstance(said, bytes) else []
    # The dtype stands before each; which number it has is torch's affair.
    starts = np.cumsum([0] + [2 + 2 * t.dim() for t in tensors])[:3]
    kept = [x for i, x in enumerate(numbers) if i not in starts]
    refused = (_empty(2, 2).to_sparse(), private.negated_view(_empty(2, 2)), private.zero_tensor(2, 2))
    is_right = np.array_equal(addresses, expected) and kept == words
    before = private.version_of(tensors[1])
    made.mark_written(tensors[1:2])
    is_right = is_right and private.version_of(tensors[1]) == before + 1
    params: list[torch.Tensor] = [torch.nn.Parameter(_empty(2)), torch.nn.Parameter(_empty(2))]
    params[0].grad = grad = _empty(2)
    said = made.describe([grad, None], addresses[:2], n_words([grad, None]))
    is_right = is_right and made.gradients_are(params, said, addresses[:2])
    is_right = is_right and addresses[:2].tolist() == [grad.data_ptr(), -1]
    return is_right and all(made.describe([tensor], addresses[:1], 6) is None for tensor in refused)
