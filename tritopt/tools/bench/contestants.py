"""Contestants of `tritopt bench --host`: lists of parameters, and somebody's step of AdamW over each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch

import tritopt
from tritopt import optim
from tritopt.engine import recent
from tritopt.engine.launcher import no_launches
from tritopt.tools.bench import peers
from tritopt.tools.bench.without_kernels import OF_FUSED, no_foreach, no_fused
from tritopt.tools.environment import device

ELEMENTS = 4
"""Number of elements of each tensor: what work there is beside kernels must not be arithmetic."""
MAX_NORM = 1.0
ABSENT = 10
"""One parameter in so many is without a gradient in one of several sets; all others have one in every set."""
OURS = "tritopt"
FUSED = "torch fused"
FOR_LOOP = "torch for-loop"
FACES = ("torch", "mxnet", "gluon")


class Step(NamedTuple):
    """A contestant's step, and what precedes it."""

    run: Callable[[], Any]
    """The step, which is timed."""
    prepare: Callable[[], Any] = lambda: None
    """Gradients as a backward pass would leave them, which is not timed."""

    def __call__(self) -> None:
        """Leave gradients as a backward pass would, and make the step."""
        self.prepare()
        self.run()


class Case(NamedTuple):
    """One list of fp32 parameters, and the way in which tritopt updates it."""

    tensors: int
    groups: int = 1
    clip: bool = False
    """Whether gradients are clipped to a global norm: by max_grad_norm, or by torch's clip_grad_norm_."""
    sets: int = 1
    """Sets of parameters that have gradients, in turn: several as with two heads, or experts without tokens."""
    face: str = FACES[0]
    """One of FACES: tritopt.optim, tritopt.create with its Updater, or tritopt.Trainer, which takes gradients away."""
    fused: bool = True
    """Whether kernels would update it, which are left out; False: the reference does, on the CPU, with one thread."""
    elements: int = ELEMENTS
    """Number of elements of each tensor."""

    @property
    def is_built(self) -> bool:
        """Whether each step is built, as a first one with its set of gradients is; otherwise replayed.

        It is where steps of so many sets are not kept until a set comes again.
        """
        present = self.tensors - -(-self.tensors // (ABSENT * self.sets))
        return self.sets > max(recent.MIN_ENTRIES, recent.MAX_SIZE // max(1, present))

    @property
    def baseline(self) -> str:
        """Name of the contestant whose time is the unit."""
        return FUSED if self.fused else FOR_LOOP

    @property
    def title(self) -> str:
        """The list and the way, in words."""
        parts = [f"{self.tensors:,} tensors"]
        if self.groups > 1:
            parts[0] += f" in {self.groups:,} groups"
        if self.elements != ELEMENTS:
            parts[0] += f" of {self.elements:,} elements"
        if self.clip:
            parts.append("clipped")
        if self.sets > 1:
            parts.append("a new set of gradients each step" if self.is_built else f"{self.sets} sets of gradients")
        if self.face != FACES[0]:
            parts.append({"mxnet": "tritopt.create", "gluon": "tritopt.Trainer"}[self.face])
        if not self.fused:
            parts.append("fused=False, one thread")
        return f"{', '.join(parts)}: {'built' if self.is_built else 'replayed'}"

    def check(self) -> None:
        """Raise ValueError if the face cannot do what is asked."""
        if self.face not in FACES:
            raise ValueError(f"face={self.face!r} must be one of {', '.join(map(repr, FACES))}")
        if self.face != FACES[0] and (self.groups, self.clip, self.sets) != (1, False, 1):
            raise ValueError(
                f"face={self.face!r} has no groups, and no norm or sets of gradients of its own, but "
                f"groups={self.groups!r}, clip={self.clip!r}, sets={self.sets!r}: leave them out, or take face='torch'"
            )


class Contestant(NamedTuple):
    """Someone who makes a step for a list."""

    name: str
    make: Callable[[Case], Step]
    """An optimizer of AdamW over such a list, and its step with the clip."""
    without_kernels: Callable[[], AbstractContextManager[Any]]
    """Context of its steps, without what is replaced."""
    replaced: str
    """Functions that were replaced by nothing, in words."""


def contestants(case: Case, rivals: Sequence[str]) -> list[Contestant]:
    """Ours, the baseline, and others among these peers that are installed."""
    if not case.fused:
        for_loop = partial(_with_clip, cls=torch.optim.AdamW, arguments={"foreach": False, "fused": False})
        return [
            Contestant(name, make, _one_thread, "nothing, with fused=False")
            for name, make in ((OURS, _ours), (FOR_LOOP, for_loop))
        ]
    return [Contestant(OURS, _ours, no_launches, "launches of Triton kernels"), *_torch(rivals), *_others(rivals)]


def groups_of(case: Case) -> list[dict[str, Any]]:
    """The parameters, with gradients."""
    where = device() if case.fused else torch.device("cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    params = []
    for _ in range(case.tensors):
        param = torch.nn.Parameter(torch.zeros(case.elements, dtype=torch.float32, device=where))
        param.grad = torch.randn(case.elements, generator=generator, dtype=torch.float32, device="cpu").to(where)
        params.append(param)
    size = -(-case.tensors // case.groups)
    return [{"params": params[i : i + size]} for i in range(0, case.tensors, size)]


def _ours(case: Case) -> Step:
    groups, fused = groups_of(case), None if case.fused else False
    if case.face == "torch":
        max_norm = MAX_NORM if case.clip else None
        opt = optim.AdamW(groups, lr=1e-3, fused=fused, max_grad_norm=max_norm)
        return _in_turn(opt.step, groups, case)
    made = tritopt.create("adamw", learning_rate=1e-3, use_fused_step=fused)
    params = [param for group in groups for param in group["params"]]
    grads = [param.grad for param in params]
    if case.face == "gluon":
        return Step(partial(tritopt.Trainer(params, made).step, 1), partial(_set_gradients, params, grads))
    weights = [param.detach() for param in params]
    return Step(partial(tritopt.get_updater(made), list(range(case.tensors)), grads, weights))


def _set_gradients(params: Sequence[torch.nn.Parameter], grads: Sequence[torch.Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def _torch(rivals: Sequence[str]) -> Iterator[Contestant]:
    ways = (
        (FUSED, {"fused": True}, no_fused, f"torch.{', torch.'.join(OF_FUSED)}; the norm of norms stays"),
        (
            "torch foreach",
            {"foreach": True},
            no_foreach,
            "torch._foreach_*, but for those of step counters, which the host computes with",
        ),
    )
    for name, arguments, without_kernels, replaced in ways:
        if name in rivals or name == FUSED:
            make = partial(_with_clip, cls=torch.optim.AdamW, arguments=arguments)
            yield Contestant(name, make, without_kernels, replaced)


def _others(rivals: Sequence[str]) -> Iterator[Contestant]:
    """Peers that are installed. Their kernels run, on tensors of a few elements: on a GPU the host does not wait."""
    for peer in peers.beside("AdamW", "fp32", rivals):
        if peer.missing() is None and not peer.name.startswith("torch") and not peer.slow_start:
            yield Contestant(peer.name, partial(_on_gpu, peer=peer), nullcontext, "nothing")


def _on_gpu(case: Case, peer: peers.Peer) -> Step:
    if device().type != "cuda":
        raise RuntimeError("its kernels need a GPU")
    return _with_clip(case, peer.cls(), peer.arguments)


def _with_clip(case: Case, cls: Any, arguments: dict[str, Any]) -> Step:
    groups = groups_of(case)
    params = [param for group in groups for param in group["params"]]
    opt = cls(groups, lr=1e-3, **arguments)
    if not case.clip:
        return _in_turn(opt.step, groups, case)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        opt.step()

    return _in_turn(step, groups, case)


def _in_turn(run: Callable[[], Any], groups: Sequence[dict[str, Any]], case: Case) -> Step:
    """The step, each time with gradients of another set of parameters: all but a few, if there are several sets."""
    if case.sets == 1:
        return Step(run)
    owned = [(param, param.grad) for group in groups for param in group["params"]]
    left_out = [owned[i :: ABSENT * case.sets] for i in range(case.sets)]
    turns = cycle(range(case.sets))

    def prepare() -> None:
        turn = next(turns)
        for param, grad in left_out[turn - 1]:
            param.grad = grad
        for param, _ in left_out[turn]:
            param.grad = None

    return Step(run, prepare)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
