"""Optimizers by name: register, create, names, and the errors of those who mistype."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tritopt
from tritopt import Optimizer

SIX = {"sgd": "SGD", "nag": "NAG", "adam": "Adam", "adamw": "AdamW", "lamb": "LAMB", "test": "Test"}


@pytest.fixture(autouse=True)
def registry_restored() -> Iterator[None]:
    before = dict(Optimizer.opt_registry)
    yield
    Optimizer.opt_registry.clear()
    Optimizer.opt_registry.update(before)


def define(name: str, where: str) -> type[Optimizer]:
    """A class as the module or function `where` would define it."""
    return type(name, (tritopt.SGD,), {"__module__": where, "__qualname__": name})


@pytest.mark.parametrize(("name", "cls"), SIX.items())
def test_registered_under_the_lower_cased_class_name(name: str, cls: str) -> None:
    assert Optimizer.opt_registry[name] is getattr(tritopt, cls)
    for spelling in (name, name.upper(), cls, name.title()):
        assert type(tritopt.create(spelling)) is getattr(tritopt, cls)


def test_names_are_sorted_and_complete() -> None:
    assert tritopt.names() == sorted(tritopt.names())
    assert set(SIX) <= set(tritopt.names())


def test_create_passes_keywords_on() -> None:
    opt = tritopt.create("adam", learning_rate=0.5, beta1=0.25, wd=0.125, use_fused_step=False)
    assert isinstance(opt, tritopt.Adam)
    assert (opt.lr, opt.beta1, opt.wd, opt.use_fused_step) == (0.5, 0.25, 0.125, False)


def test_static_methods_are_the_module_s_functions() -> None:
    assert type(Optimizer.create_optimizer("nag")) is tritopt.NAG
    assert Optimizer.register(define("Custom", "a")) is Optimizer.opt_registry["custom"]


def test_register_is_a_decorator() -> None:
    @tritopt.register
    class MyOptimizer(tritopt.SGD):
        """Optimizer that is registered at once."""

    assert MyOptimizer.__name__ == "MyOptimizer"
    assert type(tritopt.create("myoptimizer")) is MyOptimizer
    assert "myoptimizer" in tritopt.names()


def test_overwriting_warns_with_both_names() -> None:
    first, second = define("Custom", "package.one"), define("CUSTOM", "package.two")
    tritopt.register(first)
    with pytest.warns(UserWarning, match=r"package\.two\.CUSTOM.*package\.one\.Custom") as record:
        tritopt.register(second)
    assert Optimizer.opt_registry["custom"] is second
    assert record[0].filename == __file__


def test_overwriting_a_built_in_warns() -> None:
    with pytest.warns(UserWarning, match=r"mine\.SGD.*tritopt\.optimizers\.sgd\.SGD"):
        tritopt.register(define("SGD", "mine"))


def test_registering_a_class_again_is_silent() -> None:
    assert tritopt.register(tritopt.SGD) is tritopt.SGD


@pytest.mark.parametrize(
    "thing", [tritopt.SGD(), "sgd", None, lambda: tritopt.SGD()], ids=["object", "str", "None", "function"]
)
def test_only_classes_are_registered(thing: Any) -> None:
    before = dict(Optimizer.opt_registry)
    with pytest.raises(TypeError, match="Optimizer") as info:
        tritopt.register(thing)
    assert repr(thing) in str(info.value)
    assert Optimizer.opt_registry == before


@pytest.mark.parametrize("cls", [int, torch.optim.SGD])
def test_only_optimizers_are_registered(cls: Any) -> None:
    with pytest.raises(TypeError, match=cls.__name__):
        tritopt.register(cls)


@pytest.mark.parametrize(
    ("wrong", "near"), [("adma", "adam"), ("Adam_W", "adamw"), ("lam", "lamb"), ("SDG", "sgd"), ("nagg", "nag")]
)
def test_unknown_name_suggests_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(wrong))) as info:
        tritopt.create(wrong)
    assert re.search(rf"did you mean .*'{near}'", str(info.value))


@pytest.mark.parametrize("wrong", ["", "zzzzzz", "torch.optim.Adam", "adam "])
def test_unknown_name_lists_what_is_known(wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(wrong))) as info:
        tritopt.create(wrong)
    for name in SIX:
        assert name in str(info.value)


@pytest.mark.parametrize("wrong", [None, 3, b"sgd", tritopt.SGD, ["sgd"]])
def test_name_must_be_a_string(wrong: Any) -> None:
    with pytest.raises(TypeError, match="name") as info:
        tritopt.create(wrong)
    assert repr(wrong) in str(info.value)


@pytest.mark.parametrize(
    ("name", "wrong", "near"),
    [
        ("sgd", "momentun", "momentum"),
        ("sgd", "learning_rat", "learning_rate"),
        ("nag", "momentim", "momentum"),
        ("adam", "beta_1", "beta1"),
        ("adamw", "epsilom", "epsilon"),
        ("adamw", "correct_bais", "correct_bias"),
        ("lamb", "lowerbound", "lower_bound"),
        ("test", "clip_gradients", "clip_gradient"),
        ("test", "rescale_gradient", "rescale_grad"),
    ],
)
def test_unknown_keyword_suggests_the_nearest(name: str, wrong: str, near: str) -> None:
    with pytest.raises(TypeError, match=repr(wrong)) as info:
        tritopt.create(name, **{wrong: 0.5})
    assert re.search(rf"did you mean .*'{near}'", str(info.value))
    assert SIX[name] in str(info.value)


@pytest.mark.parametrize("name", SIX)
def test_unknown_keywords_are_all_named(name: str) -> None:
    with pytest.raises(TypeError, match="'zzz'") as info:
        tritopt.create(name, zzz=1, qqq=2)
    message = str(info.value)
    assert "'qqq'" in message
    # What is known: the optimizer's own arguments and those of the base class.
    assert all(known in message for known in ("learning_rate", "wd", "clip_gradient", "multi_precision"))


@pytest.mark.parametrize("name", ["nag", "adamw", "lamb", "test"])
def test_lazy_update_is_unknown_where_it_does_not_exist(name: str) -> None:
    with pytest.raises(TypeError, match=r"no argument 'lazy_update'(?!.*did you mean 'lazy_update')"):
        tritopt.create(name, lazy_update=True)
    with pytest.raises(TypeError, match="no argument") as info:
        tritopt.create(name, lazy_updat=True)
    assert "'lazy_update'" not in str(info.value)


def test_keywords_of_a_custom_optimizer_are_suggested_too() -> None:
    @tritopt.register
    class Custom(Optimizer):
        """Optimizer with an argument of its own."""

        def __init__(self, temperature: float = 1.0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.temperature = temperature

    with pytest.raises(TypeError, match=r"'temprature'.*did you mean 'temperature'"):
        tritopt.create("custom", temprature=2.0)
