"""Gradients of a Trainer: which were written since the last step, and their sums over processes.

A step uses a gradient up, until backward or an in-place operation writes to it again, or another tensor takes its
place. That is told by the tensor's identity and its version: no value is looked at, and nothing waits. Writes that
torch does not count, through `.data`, NumPy or a replay of a CUDA graph, are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import and_, attrgetter, eq, is_
from types import NoneType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tritopt.engine import private
from tritopt.gluon.parameters import GRAD_REQS, Parameters, check_grad_req
from tritopt.mxnet.multipliers import carried

_grad = attrgetter("grad")
_requires_grad = attrgetter("requires_grad")
_SHOWN = 5


class StepGradients(NamedTuple):
    """Gradients at the beginning of a step."""

    places: list[int]
    """Places of the parameters that are trained: those that require a gradient and whose grad_req is not "null"."""
    grads: list[Any]
    """Gradient of each of these, None where there is none."""
    stale: set[int]
    """Places among these whose gradient was not written since the last step."""
    kept: set[int]
    """Places among these whose gradient stays after a step, because their grad_req is "add"."""


class Marks:
    """Gradients that were noted, by identity and version: tells those that are as they were then.

    A weak reference is the same object for as long as its tensor lives, and nobody else's after that. A copy, whose
    tensors are others, has noted none.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self.clear()

    def __reduce__(self) -> tuple[type[Marks], tuple[int]]:
        return Marks, (self._n,)

    def clear(self) -> None:
        """Forget all gradients that were noted."""
        self._is_empty = True
        self._references: list[Any] = [None] * self._n
        self._versions = [-1] * self._n

    def note(self, places: Sequence[int], grads: Sequence[torch.Tensor]) -> None:
        """Note gradients as they are now."""
        self._is_empty &= not places
        references, versions = list(map(weakref.ref, grads)), _versions(grads)
        if len(places) == self._n:
            self._references, self._versions = references, versions
            return
        for i, reference, version in zip(places, references, versions, strict=True):
            self._references[i], self._versions[i] = reference, version

    def have(self, places: Sequence[int], grads: Sequence[Any]) -> set[int]:
        """Places, in ascending order, whose gradient was noted and has not been written to since."""
        if self._is_empty:
            return set()
        there = [(i, grad) for i, grad in zip(places, grads, strict=True) if grad is not None]
        places, here = [i for i, _ in there], [grad for _, grad in there]
        references, versions = self._references, self._versions
        if len(places) < self._n:
            references, versions = [references[i] for i in places], [versions[i] for i in places]
        is_same = list(map(and_, map(is_, map(weakref.ref, here), references), map(eq, _versions(here), versions)))
        return {i for i, same in zip(places, is_same, strict=True) if same} if any(is_same) else set()


def _versions(grads: Sequence[torch.Tensor]) -> list[int]:
    """Number of writes to each gradient; -1 for those of inference mode, where nothing counts."""
    try:
        return list(map(private.version_of, grads))
    except RuntimeError:
        return [-1 if grad.is_inference() else private.version_of(grad) for grad in grads]


class Gradients:
    """Gradients of some parameters, step after step; none is kept alive.

    Args:
        params: the parameters.
    """

    def __init__(self, params: Parameters) -> None:
        self._params = params
        self._all = list(range(len(params.tensors)))
        self._every = set(self._all)
        self._used = Marks(len(params.tensors))
        """Gradients that a step has used up and that are kept."""
        self._reduced = Marks(len(params.tensors))
        """Gradients that are sums over processes already."""

    def find(self) -> StepGradients:
        """Find the gradients. ValueError for a grad_req that is none."""
        params, places = self._params.tensors, self._all
        kept: set[int] = set()
        wanted, reqs = list(map(_requires_grad, params)), carried(params, "grad_req") or []
        if reqs and reqs.count("add") == len(reqs) and all(wanted):
            kept = self._every
        elif reqs or not all(wanted):
            reqs = reqs or [None] * len(params)
            for req in set(reqs) - {None, *GRAD_REQS}:
                check_grad_req(req)
            places = [i for i in places if wanted[i] and reqs[i] != "null"]
            kept = {i for i in places if reqs[i] == "add"}
            params = [params[i] for i in places]
        grads = list(map(_grad, params))
        stale = self._used.have(places, grads)
        if NoneType in set(map(type, grads)):
            stale |= {i for i, grad in zip(places, grads, strict=True) if grad is None}
        return StepGradients(places, grads, stale, kept)

    def used(self, current: StepGradients, places: Sequence[int]) -> None:
        """Note that a step has used up the gradients at these places: they are dropped, or kept where they add up.

        Those of parameters that are not trained go too, or backward would add to them until they are.
        """
        params = self._params.tensors
        self._reduced.clear()
        if len(current.places) < len(params):
            for i in self._every.difference(current.places):
                if getattr(params[i], "grad_req", None) != "add":
                    params[i].grad = None
        if current.kept is self._every and len(places) == len(self._all):
            self._used.note(places, list(map(_grad, params)))
            return
        if current.kept:
            kept = [i for i in places if i in current.kept]
            self._used.note(kept, list(map(_grad, [params[i] for i in kept])))
            places = [i for i in places if i not in current.kept]
        for i in places:
            params[i].grad = None

    def zero(self, set_to_none: bool) -> None:
        """Let go of all gradients, or write zeros, which are not fresh."""
        self._reduced.clear()
        for i, param in enumerate(self._params.tensors):
            if set_to_none or param.grad is None:
                param.grad = None
            else:
                if param.grad.grad_fn is None:
                    param.grad.requires_grad_(False)
                else:  # refused for views, such as the buckets of DistributedDataParallel
                    param.grad.detach_()
                param.grad.zero_()
                self._used.note([i], [param.grad])

    def refuse_stale(self, current: StepGradients) -> None:
        """Raise UserWarning, as Gluon does, if gradients are stale."""
        if current.stale:
            stale = sorted(current.stale)
            several = "s" if len(stale) > 1 else ""
            labels = ", ".join(map(self._params.label, stale[:_SHOWN]))
            labels += f" and {len(stale) - _SHOWN} more" if len(stale) > _SHOWN else ""
            raise UserWarning(
                f"Gradient of Parameter{several} {labels} has not been updated by backward since last `step`. This "
                "could mean a bug in your model that made it only use a subset of the Parameters for this iteration. "
                "If you are intentionally only using a subset, call step with ignore_stale_grad=True to suppress this "
                "error and skip updating of Parameters with stale gradient"
            )

    # Over processes.

    def add_up(self, current: StepGradients, agree: bool) -> StepGradients:
        """Sum gradients up over all processes, in place, in one all-reduce for each dtype and device.

        agree: let the processes find out which gradients are fresh in any of them, which waits for all; a process
        where such a one is stale has zeros to add. Otherwise all are fresh in each.

        Raises:
            RuntimeError: some are sums already. TypeError: sparse ones. Nothing is sent then.
        """
        params, live = self._params.tensors, current.places
        if agree and live:
            flags = torch.tensor([i not in current.stale for i in live], dtype=torch.uint8, device=params[0].device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            live = [i for i, is_fresh in zip(live, flags.tolist(), strict=True) if is_fresh]
        self._check_sent([i for i in live if i not in current.stale])
        for i in current.stale.intersection(live):
            params[i].grad = torch.zeros_like(params[i], requires_grad=False)
        grads: list[Any] = [params[i].grad for i in live]
        by_kind: dict[Any, list[torch.Tensor]] = {}
        for grad in grads:
            by_kind.setdefault((grad.dtype, grad.device), []).append(grad.detach())
        for alike in by_kind.values():
            _add_up(alike)
        self._reduced.note(live, grads)
        return current._replace(grads=[params[i].grad for i in current.places], stale=current.stale.difference(live))

    def _check_sent(self, places: Sequence[int]) -> None:
        grads: list[Any] = [self._params.tensors[i].grad for i in places]
        for i in self._reduced.have(places, grads):
            raise RuntimeError(f"gradient of {self._params.label(i)} is a sum already: call update(), and not step()")
        for i, grad in zip(places, grads, strict=True):
            if grad.layout != torch.strided:
                raise TypeError(
                    f"gradient of {self._params.label(i)} is sparse, which is not summed up over processes: make it "
                    "dense, as nn.Embedding(sparse=False) does"
                )


@torch.no_grad()
def _add_up(grads: list[torch.Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def n_processes() -> int:
    """Number of processes of the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
