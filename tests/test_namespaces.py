"""Names of MXNet resolve in the places where its scripts look for them."""

from __future__ import annotations

import importlib

import pytest

import tritopt as mx

# `mxnet.optimizer.__all__` of 2.0, AdamW, which it exports all the same, and what scripts reach through `mx.optimizer`.
OPTIMIZER = [
    "AdaBelief", "AdaDelta", "AdaGrad", "Adam", "AdamW", "Adamax", "DCASGD", "FTML", "Ftrl", "LAMB", "LANS", "LARS",
    "NAG", "Nadam", "Optimizer", "RMSProp", "SGD", "SGLD", "Signum", "Test", "Updater", "create", "get_updater",
    "register",
]  # fmt: skip
SCHEDULERS = ["CosineScheduler", "FactorScheduler", "LRScheduler", "MultiFactorScheduler", "PolyScheduler"]


@pytest.mark.parametrize(
    "name",
    [
        *[f"optimizer.{name}" for name in OPTIMIZER],
        *[f"lr_scheduler.{name}" for name in SCHEDULERS],
        "optimizer.contrib.GroupAdaGrad",
        "gluon.Trainer",
        "gluon.utils.clip_global_norm",
    ],
)
def test_resolves(name: str) -> None:
    place, _, last = name.rpartition(".")
    value = mx
    for part in name.split("."):
        value = getattr(value, part)
    # `from mxnet.optimizer import SGD` is the other way to say it.
    assert getattr(importlib.import_module(f"tritopt.{place}"), last) is value


def test_they_are_the_same_objects() -> None:
    assert mx.optimizer.create is mx.create
    assert mx.gluon.Trainer is mx.Trainer
    assert mx.gluon.utils.clip_global_norm is mx.clip_global_norm
    assert mx.optimizer.contrib.GroupAdaGrad is mx.GroupAdaGrad
    assert all(getattr(mx.optimizer, name) is getattr(mx, name) for name in OPTIMIZER)
