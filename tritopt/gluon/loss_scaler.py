"""LossScaler: a dynamic loss scale for fp16 gradients that is read, and decided upon, on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from tritopt.engine import validate
from tritopt.engine.device import on_device
from tritopt.engine.launcher import BoundKernel
from tritopt.engine.plan import unavailable
from tritopt.kernels.loss_scale import loss_scale_update

Loss = TypeVar("Loss", torch.Tensor, list[torch.Tensor], tuple[torch.Tensor, ...])
_CPU = torch.device("cpu")


class LossScaler:
    """Factor of the loss that keeps small fp16 gradients from underflowing; with the values of MXNet's amp.

        overflow                             scale <- max(scale / scale_factor, min_loss_scale)
        scale_window steps in a row without  scale <- min(scale * scale_factor, max_loss_scale)

    A step overflows if a gradient is NaN or infinite, or if the sum of squares of fp32 or bf16 gradients exceeds fp32.
    Such a step writes no weight and no state. Its count advances all the same, and so does a schedule: the host, which
    keeps both, does not wait to hear of it. A new scale counts from the next step on; MXNet's, which the host decides,
    from the one after that.

    Give it to a Trainer, each its own: `Trainer(model, "adam", loss_scaler=LossScaler())`.

    Args:
        init_scale: the first scale.
        scale_factor: > 1.
        scale_window: number of steps, >= 1.
        min_loss_scale, max_loss_scale: bounds of the scale.

    Raises:
        ValueError, TypeError: arguments out of range.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        scale_factor: float = 2.0,
        scale_window: int = 2000,
        min_loss_scale: float = 2.0**-24,
        max_loss_scale: float = 2.0**24,
    ) -> None:
        scale_factor = validate.finite("scale_factor", scale_factor)
        if scale_factor <= 1:
            raise ValueError(f"scale_factor={scale_factor!r} must be > 1")
        if validate.count("scale_window", scale_window) < 1:
            raise ValueError(f"scale_window={scale_window!r} must be at least 1")
        least, most = (validate.finite(name, value) for name, value in
                       (("min_loss_scale", min_loss_scale), ("max_loss_scale", max_loss_scale)))  # fmt: skip
        if not 0 < least <= most:
            raise ValueError(f"min_loss_scale={least!r} must be > 0 and at most max_loss_scale={most!r}")
        self._least, self._most = least, most
        self._constants = {
            "GROWTH": float(scale_factor),
            "BACKOFF": 1.0 / scale_factor,
            "WINDOW": int(scale_window),
            "LEAST": float(least),
            "MOST": float(most),
        }
        self._scale = self._checked_scale("init_scale", init_scale)
        self._clean = torch.zeros((), dtype=torch.int32, device=_CPU)
        self._begin()

    def _begin(self) -> None:
        self._trainer: Callable[[], Any] = lambda: None
        self._launch = BoundKernel(loss_scale_update, 1, {**self._constants, "enable_fp_fusion": False})

    def __getstate__(self) -> dict[str, Any]:
        """A copy is nobody's."""
        return {name: value for name, value in vars(self).items() if name not in ("_trainer", "_launch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def loss_scale(self) -> float:
        """The scale of the next step's loss; to read it waits for the device."""
        return float(self._scale.cpu())

    def scale(self, loss: Loss) -> Loss:
        """A loss, or each of several, times the scale, which is on its device."""
        if isinstance(loss, list | tuple):
            return type(loss)(map(self.scale, loss))
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"a loss to be scaled is a tensor, or a list of tensors, got {loss!r:.60}")
        return loss * self._scale.to(loss.device)

    def inverse(self, rescale: float) -> torch.Tensor:
        """`rescale` over the scale, fp64 [] on the device: the rescale_grad of the next step."""
        return rescale / self._scale.double()

    def update(self, factor: torch.Tensor) -> None:
        """Decide upon the next scale. factor: what a step multiplied gradients by, fp64 []; NaN if it was skipped."""
        factor = factor.to(self._scale.device)
        if unavailable(factor) is None:
            with on_device(factor.device):
                self._launch(None, factor, self._scale, self._clean)
            return
        c, clean = self._constants, self._clean + 1
        is_skipped, is_grown = factor.isnan(), clean >= c["WINDOW"]
        grown = torch.where(is_grown, (self._scale * c["GROWTH"]).clamp(max=c["MOST"]), self._scale)
        self._scale.copy_(torch.where(is_skipped, (self._scale * c["BACKOFF"]).clamp(min=c["LEAST"]), grown))
        self._clean.copy_(torch.where(is_skipped | is_grown, 0, clean))

    def move_to(self, device: torch.device) -> None:
        """Keep the scale on this device."""
        if self._scale.device != device:
            self._scale, self._clean = self._scale.to(device), self._clean.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The scale, and the number of steps since it changed or one overflowed; waits for the device."""
        return {"loss_scale": self.loss_scale, "clean_steps": int(self._clean.cpu())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. ValueError or TypeError for anything else; nothing changes then."""
        scale, clean = self.checked_state(state)
        self._scale.copy_(scale)
        self._clean.fill_(clean)

    def checked_state(self, state: Any) -> tuple[torch.Tensor, int]:
        """Scale and steps of a state, with the errors of `load_state_dict`."""
        if not isinstance(state, Mapping) or set(state) != {"loss_scale", "clean_steps"}:
            raise ValueError(f"{state!r:.80} is not what LossScaler.state_dict() gave")
        scale = self._checked_scale("loss_scale", state["loss_scale"])
        return scale, validate.count("clean_steps", state["clean_steps"])

    def check_free(self) -> None:
        """ValueError if a Trainer has it: two would decide upon the scale."""
        if self._trainer() is not None:
            raise ValueError("this LossScaler is another Trainer's, and both would change its scale: make one for each")

    def bind(self, trainer: object) -> None:
        """Note whose it is, which is nobody's."""
        self._trainer = weakref.ref(trainer)

    def _checked_scale(self, name: str, value: Any) -> torch.Tensor:
        """fp32 [] on the CPU. ValueError unless it is within the bounds."""
        if not self._least <= validate.number(name, value) <= self._most:
            raise ValueError(f"{name}={value!r} must be within the bounds {self._least!r} and {self._most!r}")
        return torch.tensor(float(value), dtype=torch.float32, device=_CPU)
