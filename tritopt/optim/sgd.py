"""SGD, as torch defines it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from typing_extensions import Unpack

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.scalars import where
from tritopt.kernels.formats.format import Format
from tritopt.kernels.sgd import sgd_buffer_update, sgd_nesterov_update, sgd_update
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.layout import Layouts, State
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.rule import Rule, Values, takes_arrays


class TorchSGDScalars(NamedTuple):
    """Scalars that the update reads beside its tensors."""

    lr: float
    momentum: float
    grad_share: float
    """Share of the gradient in the buffer: 1 - dampening; 1 in the step that the buffer begins with."""


class TorchSGD(Rule):
    """The recurrence of `SGD` below; the buffer holds gradients, where MXNet's holds updates."""

    variants = ({}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True})

    def __init__(self, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.momentum = validate.nonnegative("momentum", momentum)
        self.dampening = validate.finite("dampening", dampening)
        self.nesterov = bool(nesterov)
        if nesterov and momentum and dampening:  # torch checks this in its constructor, but not in a group
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: one launch."""
        if not self.momentum:
            return (Apply(sgd_update),)
        return (Apply(sgd_nesterov_update if self.nesterov else sgd_buffer_update),)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The momentum buffer, if there is momentum."""
        return ("momentum",) if self.momentum else ()

    def scalars(self, lr: Any, wd: float, count: Any) -> TorchSGDScalars:
        """Scalars of a step. A buffer begins with the gradient, whatever the dampening."""
        return TorchSGDScalars(lr, self.momentum, where(count == 1, 1.0, 1 - self.dampening))

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: TorchSGDScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence of `SGD` below: the new weight and states."""
        if not self.momentum:
            return w - s.lr * g, ()
        (buffer,) = state
        if self.nesterov:
            buffer = s.momentum * buffer + g
            return w - s.lr * (g + s.momentum * buffer), (buffer,)
        buffer = s.momentum * buffer + s.grad_share * g
        return w - s.lr * buffer, (buffer,)


class BufferLayouts(Layouts):
    """A momentum buffer, and as torch's no step: but one that random bits depend on must be in checkpoints."""

    def shows_numbers(self, formats: tuple[Format, ...]) -> bool:
        """Whether the step stands in a state: where a format draws random bits."""
        return any(fmt.draws for fmt in formats)

    def first_count(self, state: State) -> float:
        """Steps that a state stands for which does not show them: a buffer that is there has begun."""
        return float(_has_buffer(state))

    def begins_anew(self, state: State) -> bool:
        """Momentum that is switched on between steps begins like that of a first step."""
        return not _has_buffer(state)

    def complete_loaded(self, state: State) -> None:
        """Make a loaded buffer dense; torch's is sparse where gradients are."""
        if "momentum_buffer" in state:
            state["momentum_buffer"] = state["momentum_buffer"].to_dense()


class SGD(Optimizer):
    """`torch.optim.SGD`: gradient descent, with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013, ICML).

        g_t = grad + weight_decay w_{t-1}
        b_t = momentum b_{t-1} + (1 - dampening) g_t,  b_1 = g_1
        w_t = w_{t-1} - lr g_t                          without momentum
        w_t = w_{t-1} - lr b_t                          with momentum
        w_t = w_{t-1} - lr (g_t + momentum b_t)         with nesterov

    State with momentum: momentum_buffer (b), the (master) weight's shape and dtype. There is a step only where formats
    draw random bits. Sparse gradients are taken as dense ones with zero rows. Arguments and errors are torch's, and
    capturable; options: `Options`.
    """

    rule = TorchSGD
    layouts_class = BufferLayouts
    torch_class = torch.optim.SGD
    may_lack = frozenset({"step", "momentum_buffer"})
    arguments: ClassVar = {"momentum": "momentum", "dampening": "dampening", "nesterov": "nesterov"}

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = torch_defaults(
            SGD.torch_class,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, {**defaults, "capturable": capturable}, options)


def _has_buffer(state: State) -> bool:
    return any(key.startswith("momentum_buffer") for key in state)
