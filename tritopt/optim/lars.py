"""LARS with torch's interface."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import Unpack

from tritopt.engine import validate
from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import lars


class TorchLARS(lars.LARSRule):
    """MXNet's LARS, told by an argument rather than by names which parameters have rates of their own."""

    def __init__(self, layer_wise: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.layer_wise = validate.boolean("layer_wise", layer_wise)

    def scalars(self, lr: Any, wd: float, count: Any) -> Any:
        """Scalars of a step, with the switch `is_layer_wise`."""
        return super().scalars(lr, wd, count)._replace(is_layer_wise=float(self.layer_wise))


class LARS(BeyondTorch):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv:1708.03888, algorithm 1).

        r_t = trust_coefficient |w_{t-1}| / (|grad| + weight_decay |w_{t-1}| + eps),
              or 1 where a norm is 0 or |w| infinite
        m_t = momentum m_{t-1} - lr r_t (grad + weight_decay w_{t-1})
        w_t = w_{t-1} + m_t

    |.| is the norm of a whole parameter, of its master if there is one. State: momentum_buffer (m), none with
    momentum=0. It is customary to give biases and normalisation layers a param_group with layer_wise=False (r_t = 1)
    and weight_decay=0. Defaults are the paper's trust coefficient and momentum, and MXNet's rate.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate per step, of a parameter's norm times trust_coefficient.
        momentum: share of the last update that is kept, >= 0.
        weight_decay: coupled (L2).
        trust_coefficient: distance that a layer moves, relative to its norm, >= 0.
        eps: added to the norms.
        layer_wise: False for plain SGD.
        options: see `Keywords`.
    """

    rule = TorchLARS
    arguments: ClassVar = {
        "momentum": "momentum",
        "trust_coefficient": "eta",
        "eps": "epsilon",
        "layer_wise": "layer_wise",
    }

    def __init__(
        self,
        params: Params,
        lr: Rate = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        layer_wise: bool = True,
        **options: Unpack[Keywords],
    ) -> None:
        own = {"trust_coefficient": trust_coefficient, "eps": eps, "layer_wise": layer_wise}
        super().__init__(params, options, lr, weight_decay, momentum=momentum, **own)
