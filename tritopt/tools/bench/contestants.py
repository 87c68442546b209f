"""Contestants of `tritopt bench --host`: lists of parameters, and somebody's step of AdamW, or of Muon and AdamW."""

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
from tritopt.tools.bench.shapes import MODELS
from tritopt.tools.bench.without_kernels import OF_FUSED, no_foreach, no_fused, no_iteration
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
SMALLER = 256
"""Divisor of the dimensions of a model's tensors: the host's time depends on their number and that of their shapes."""


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
    mixed: bool = False
    """Whether it is Llama-3-8B, its matrices between layers for Muon and the rest for AdamW: `mixed_case`."""
    scheduled: bool = False
    """Whether learning rates change at every step."""

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
        if self.mixed:
            parts[0] += " of Llama-3-8B by Muon and AdamW"
        if self.groups > 1 and not self.mixed:
            parts[0] += f" in {self.groups:,} groups"
        if self.elements != ELEMENTS:
            parts[0] += f" of {self.elements:,} elements"
        if self.clip:
            parts.append("clipped")
        if self.scheduled:
            parts.append("scheduled")
        if self.sets > 1:
            parts.append("a new set of gradients each step" if self.is_built else f"{self.sets} sets of gradients")
        if self.face != FACES[0]:
            parts.append({"mxnet": "tritopt.create", "gluon": "tritopt.Trainer"}[self.face])
        if not self.fused:
            parts.append("fused=False, one thread")
        return f"{', '.join(parts)}: {'built' if self.is_built else 'replayed'}"

    def check(self) -> None:
        """Raise ValueError if the face cannot do what is asked."""
        if self.mixed and self != mixed_case(self.clip, self.scheduled):
            raise ValueError(f"{self} is not Llama-3-8B by two rules: make it by mixed_case()")
        if self.face not in FACES:
            raise ValueError(f"face={self.face!r} must be one of {', '.join(map(repr, FACES))}")
        if self.face != FACES[0] and (self.groups, self.clip, self.sets) != (1, False, 1):
            raise ValueError(
                f"face={self.face!r} has no groups, and no norm or sets of gradients of its own, but "
                f"groups={self.groups!r}, clip={self.clip!r}, sets={self.sets!r}: leave them out, or take face='torch'"
            )


def mixed_case(clip: bool = False, scheduled: bool = False) -> Case:
    """Llama-3-8B by Muon and AdamW."""
    n_tensors = len(MODELS["llama3-8b"].shapes().tensors)
    return Case(n_tensors, 2, clip, mixed=True, scheduled=scheduled)


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
    if case.mixed:
        replaced = f"torch.{', torch.'.join(OF_FUSED)} and torch's Newton-Schulz iteration; the rest of Muon stays"
        return [
            Contestant(OURS, _ours, no_launches, "launches of Triton kernels, and products of matrices"),
            Contestant(FUSED, _torchs_two, no_iteration, replaced),
        ]
    return [Contestant(OURS, _ours, no_launches, "launches of Triton kernels"), *_torch(rivals), *_others(rivals)]


def groups_of(case: Case) -> list[dict[str, Any]]:
    """The parameters, with gradients."""
    where = device() if case.fused else torch.device("cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    params = []
    shapes: Sequence[tuple[int, ...]] = [(case.elements,)] * case.tensors
    if case.mixed:
        shapes = [tuple(-(-n // SMALLER) for n in shape) for shape in MODELS["llama3-8b"].shapes().tensors]
    for shape in shapes:
        param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=where))
        param.grad = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(where)
        params.append(param)
    if case.mixed:  # embedding and head are the first and the last
        matrices = [param for param in params[1:-1] if param.dim() > 1]
        return [{"params": matrices}, {"params": [params[0], *[p for p in params if p.dim() < 2], params[-1]]}]
    size = -(-case.tensors // case.groups)
    return [{"params": params[i : i + size]} for i in range(0, case.tensors, size)]


def _ours(case: Case) -> Step:
    groups, fused = groups_of(case), None if case.fused else False
    max_norm = MAX_NORM if case.clip else None
    if case.mixed:
        of_muon, of_adamw = groups
        rules = [
            {**of_muon, "algorithm": "Muon", "lr": 0.02, "in_norm": False},
            {**of_adamw, "algorithm": "AdamW", "lr": 1e-3},
        ]
        mixed = optim.Mixed(rules, max_grad_norm=max_norm)
        return _scheduled(mixed.step, [mixed], case)
    if case.face == "torch":
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


def _torchs_two(case: Case) -> Step:
    of_muon, of_adamw = groups_of(case)
    opts: list[torch.optim.Optimizer] = [torch.optim.Muon([of_muon], lr=0.02)]
    opts.append(torch.optim.AdamW([of_adamw], lr=1e-3, fused=True))

    def step() -> None:
        if case.clip:
            torch.nn.utils.clip_grad_norm_(of_adamw["params"], MAX_NORM)
        for opt in opts:
            opt.step()

    return _scheduled(step, opts, case)


def _scheduled(run: Callable[[], Any], opts: Sequence[torch.optim.Optimizer], case: Case) -> Step:
    """The step, before which learning rates change if they are to."""
    if not case.scheduled:
        return Step(run)
    groups = [group for opt in opts for group in opt.param_groups]

    def prepare() -> None:
        for group in groups:
            group["lr"] *= 0.9999

    return Step(run, prepare)


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
