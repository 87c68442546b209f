"""Attributes that are assigned between two updates are checked as the constructor checks them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tritopt
from tritopt.mxnet.registry import registered

NAN = math.nan
BAD: dict[str, tuple[Any, ...]] = {
    "wd": (NAN, "x"),
    "lr": (-1, NAN, "x"),
    "beta1": (2.0, -1, NAN),
    "epsilon": (-1, NAN),
    "momentum": (-1, NAN),
    "clip_gradient": ("x", NAN),
    "rescale_grad": ("x",),
    "master": ("spit8", 3),
    "state_dtype": ("fp4",),
    "multi_precision": ("yes",),
    "use_fused_step": ("no",),
    "aggregate_num": ("x", -1),
    "rounding_seed": (-1, 0.5),
    "max_grad_norm": (0, NAN, "x"),
}
NAMES = [name for name, cls in registered().items() if cls.__module__.startswith("tritopt.")]


@pytest.mark.parametrize("attribute", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_assigned_between_two_updates(name: str, attribute: str) -> None:
    opt: Any = tritopt.create(name, multi_precision=True, use_fused_step=False)
    if attribute not in vars(opt):
        return
    updater = tritopt.get_updater(opt)
    weight, grad = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 3), 0.5, dtype=torch.bfloat16)
    updater(0, grad, weight)
    good = getattr(opt, attribute)
    for value in BAD[attribute]:
        setattr(opt, attribute, value)
        before = weight.clone()
        for index in (0, 1):  # and where a state is to be made
            with pytest.raises((ValueError, TypeError)) as caught:
                updater(index, grad, weight)
            assert attribute.replace("lr", "learning") in str(caught.value).replace("learning rate", "learning")
        assert torch.equal(weight, before)
        assert opt._index_update_count == {0: 1}
        assert list(updater.states) == [0]
    setattr(opt, attribute, good)
    updater(0, grad, weight)


def test_a_dtype_of_torch_may_be_assigned() -> None:
    opt = tritopt.create("adam", use_fused_step=False)
    opt.state_dtype = torch.bfloat16  # type: ignore[assignment]
    assert opt.create_state_multi_precision(0, torch.ones(64))[0].dtype == torch.bfloat16


def test_a_users_constructor_is_not_called_again() -> None:
    calls = []

    class Own(tritopt.Optimizer):
        def __init__(self, decay: float = 0.5, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.decay = decay
            calls.append(decay)

        def scalars(self, lr: float, wd: float, count: int) -> Any:
            return (lr,)

        def reference(self, w: torch.Tensor, g: torch.Tensor, state: Any, s: Any) -> Any:
            return w - s[0] * g, ()

    opt = Own(use_fused_step=False)
    opt.decay = 0.25
    opt.update([0], [torch.ones(2)], [torch.ones(2)], [None])
    assert calls == [0.5]
