"""Mixed: several classes in one optimizer do what each does alone, and what no class is meant for is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

from tests.support.training import Params, assert_same, everything, parameters, record_launches, set_grads
from tritopt import optim
from tritopt.engine.launcher import launches
from tritopt.engine.phase import LaunchSpec
from tritopt.optim.origin import CLASSES

FUSED = pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
MUON: dict[str, Any] = {"algorithm": "Muon", "lr": 0.02, "in_norm": False}
ADAMW: dict[str, Any] = {"algorithm": "AdamW", "lr": 1e-3}


class Tied(torch.nn.Module):
    """A model whose head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 6)
        self.hidden = torch.nn.Linear(6, 8)
        self.convolution = torch.nn.Conv1d(1, 2, 3)
        self.back = torch.nn.Linear(8, 6, bias=False)
        self.norm = torch.nn.LayerNorm(6)
        self.lm_head = torch.nn.Linear(6, 10)
        self.lm_head.weight = self.embedding.weight
        self.frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.back(torch.relu(self.hidden(self.embedding(x))))
        drawn = self.convolution(hidden[:, None]).mean()
        return self.lm_head(self.norm(hidden)) + drawn  # type: ignore[no-any-return]


def gradients(model: Tied, seed: int) -> None:
    model.zero_grad()
    x = torch.arange(10).roll(seed)
    torch.nn.functional.cross_entropy(model(x), x).backward()


def mixed(params: Params, **options: Any) -> optim.Mixed:
    return optim.Mixed([{"params": params[:2], **MUON}, {"params": params[2:], **ADAMW}], **options)


@FUSED
@pytest.mark.parametrize("master", ["split16", "stochastic"])
def test_each_class_does_what_it_does_alone(fused: bool | None, master: str) -> None:
    """Equality is to the bit, states, checkpoints and clip included: the norm is AdamW's alone."""
    together, apart = Tied().bfloat16(), Tied().bfloat16()
    apart.load_state_dict(together.state_dict())
    options: dict[str, Any] = {"fused": fused, "master": master}
    opt = optim.Mixed.from_module(together, MUON, ADAMW, max_grad_norm=0.5, **options)
    named = dict(apart.named_parameters())
    routes = {route.name: route.algorithm for route in opt.routing()}
    # Random bits go by name.
    muon = optim.Muon([(n, named[n]) for n, cls in routes.items() if cls == "Muon"], lr=0.02, **options)
    adamw = optim.AdamW(
        [(n, named[n]) for n, cls in routes.items() if cls == "AdamW"], lr=1e-3, max_grad_norm=0.5, **options
    )
    for seed in range(5):
        for model in (together, apart):
            gradients(model, seed)
        for one in (opt, muon, adamw):
            one.step()
        torch.testing.assert_close(opt.grad_norm, adamw.grad_norm, rtol=0, atol=0)
        if seed == 2:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    by_name = dict(together.named_parameters())
    for name in routes:
        assert torch.equal(by_name[name], named[name]), name
        theirs = (muon if routes[name] == "Muon" else adamw).state[named[name]]
        ours = opt.state[by_name[name]]
        assert ours.keys() == theirs.keys()
        assert_same([ours[key] for key in sorted(ours)], [theirs[key] for key in sorted(theirs)])


def test_a_launch_for_each_phase_of_a_class_not_of_a_group() -> None:
    params = parameters(shapes=((4, 6),) * 6)
    groups = [{"params": [p], **(MUON if i % 2 else ADAMW), "lr": 0.01 * i} for i, p in enumerate(params)]
    opt = optim.Mixed(groups, fused=True)
    for step in range(3):
        set_grads(params, step)
        before = launches.n_begun
        opt.step()
        assert launches.n_begun - before == 1 + 2


def test_one_norm_clips_those_that_count_and_a_skip_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(shapes=((4, 6), (3, 4), (5,)))
    opt = mixed(params, max_grad_norm=1.0, fused=True)
    for step in range(3):
        set_grads(params, step)
        opt.step()
        torch.testing.assert_close(opt.grad_norm, params[2].grad.norm())  # type: ignore[union-attr]
    seen: list[tuple[int, LaunchSpec]] = record_launches(monkeypatch)
    params[2].grad.fill_(torch.nan)  # type: ignore[union-attr]
    before = [*(p.detach().clone() for p in params), *(opt.state[p]["momentum_buffer"].clone() for p in params[:2])]
    opt.step()
    assert_same([*params, *(opt.state[p]["momentum_buffer"] for p in params[:2])], before)
    assert any(launch.rescale is not None and launch.rescale.isnan() for _, launch in seen)


def test_loss_scale_reaches_those_that_are_not_in_the_norm() -> None:
    copies = [parameters(shapes=((4, 6), (3, 4), (5,))) for _ in range(2)]
    for params, scale in zip(copies, (1.0, 8.0), strict=True):
        opt: Any = mixed(params, max_grad_norm=1.0, fused=True)
        for step in range(2):
            set_grads(params, step, scale)
            opt.grad_scale = torch.tensor(scale)
            opt.step()
    for a, b in zip(*copies, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"NAdam"}))
def test_every_class_goes_beside_another(name: str) -> None:
    params, alone = (parameters(shapes=((4, 6), (3, 4))) for _ in range(2))
    opt = optim.Mixed([{"params": params[:1], "algorithm": name}, {"params": params[1:], **MUON}], fused=False)
    single = CLASSES[name](alone[:1], fused=False)
    for step in range(3):
        set_grads(params, step)
        alone[0].grad = params[0].grad.clone()  # type: ignore[union-attr]
        opt.step()
        single.step()
    assert torch.equal(params[0], alone[0])
    assert opt.state_dict()["state"].get(0, {}).keys() == single.state_dict()["state"].get(0, {}).keys()


def test_a_scheduler_and_a_new_group_reach_all() -> None:
    params = parameters(shapes=((4, 6), (3, 4), (5,)))
    opt = mixed(params)
    added = parameters(shapes=((2, 2),))
    opt.add_param_group({"params": added, "algorithm": "Lion"})
    assert opt.param_groups[2]["betas"] == (0.9, 0.99)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    set_grads([*params, *added], 0)
    before = added[0].detach().clone()
    opt.step()
    torch.testing.assert_close((before - added[0]).abs(), torch.full((2, 2), 1e-4), rtol=0, atol=1e-6)
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.01, 5e-4, 5e-5]


def test_copies_go_on_alike() -> None:
    params = parameters(shapes=((4, 6), (3, 4), (5,)))
    opt = mixed(params)
    set_grads(params, 0)
    opt.step()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        theirs = [p for group in other.param_groups for p in group["params"]]
        set_grads(theirs, 1)
        other.step()
        last = everything(other)
    set_grads(params, 1)
    opt.step()
    assert_same(everything(opt), last)


# Routing.


def test_parameters_are_routed_by_what_they_are() -> None:
    opt = optim.Mixed.from_module(Tied(), MUON, ADAMW, embeddings={"algorithm": "SGD"}, patterns={"*.bias": ADAMW})
    assert {route.name: (route.algorithm, route.in_norm) for route in opt.routing()} == {
        "hidden.weight": ("Muon", False),
        "back.weight": ("Muon", False),
        "embedding.weight": ("SGD", True),  # the head's too
        "convolution.weight": ("AdamW", True),
        "norm.weight": ("AdamW", True),
        **dict.fromkeys(("hidden.bias", "convolution.bias", "norm.bias", "lm_head.bias"), ("AdamW", True)),
    }
    table = str(opt.routing())
    assert "hidden.weight" in table
    assert "8 x 6" in table


def test_a_head_of_its_own_is_told_by_its_name() -> None:
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4), "lm_head": torch.nn.Linear(4, 4)})
    opt = optim.Mixed.from_module(model, MUON, ADAMW)
    assert [route.name for route in opt.routing() if route.algorithm == "Muon"] == ["up.weight"]


@pytest.mark.parametrize("pattern", ["lm_head.*", "lm_head.weight", "embedding.weight"])
def test_a_tied_weight_has_all_its_names(pattern: str) -> None:
    opt = optim.Mixed.from_module(Tied(), MUON, ADAMW, patterns={pattern: {"algorithm": "SGD"}})
    assert next(r for r in opt.routing() if r.name == "embedding.weight").algorithm == "SGD"


def test_a_pattern_may_be_called_as_a_destination() -> None:
    model = torch.nn.ModuleDict({"tok": torch.nn.Embedding(4, 4), "up": torch.nn.Linear(4, 4)})
    model.register_parameter("embeddings", torch.nn.Parameter(torch.ones(3)))
    opt = optim.Mixed.from_module(model, MUON, ADAMW, patterns={"embeddings": {"algorithm": "SGD", "lr": 1.0}})
    assert {r.name: r.algorithm for r in opt.routing()} == {
        "up.weight": "Muon", "up.bias": "AdamW", "tok.weight": "AdamW", "embeddings": "SGD",
    }  # fmt: skip


def test_a_compiled_module_has_the_names_of_its_inside() -> None:
    compiled: Any = torch.compile(torch.nn.Linear(4, 4), backend="eager")
    model = torch.nn.Sequential(compiled, torch.nn.Linear(4, 4))
    opt = optim.Mixed.from_module(model, MUON, ADAMW, patterns={"0.weight": ADAMW})
    assert {r.name: r.algorithm for r in opt.routing()}["0.weight"] == "AdamW"


def test_takes_groups_of_param_groups_and_of_schedulers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    groups = optim.param_groups(model, {"*.weight": MUON}, default=ADAMW)
    opt = optim.Mixed(groups)
    assert {r.name: r.algorithm for r in opt.routing()}["0.bias"] == "AdamW"
    saved = torch.optim.lr_scheduler.StepLR(opt, 1).optimizer.state_dict()["param_groups"]
    resumed = optim.Mixed([{**group, "params": old["params"]} for group, old in zip(saved, groups, strict=True)])
    torch.optim.lr_scheduler.StepLR(resumed, 1, last_epoch=3)


def test_a_head_is_told_by_any_of_its_names() -> None:
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4, bias=False), "lm_head": torch.nn.Linear(4, 4, bias=False)})
    model["lm_head"].weight = model["up"].weight
    (route,) = optim.Mixed.from_module(model, MUON, ADAMW).routing()
    assert route.algorithm == "AdamW"


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 3, 4))


def test_experts_are_a_stack_where_matrices_say_so() -> None:
    with pytest.raises(ValueError, match=r"parameter 'weight': no rule takes one of shape \(2, 3, 4\)"):
        optim.Mixed.from_module(Experts(), MUON, ADAMW)
    opt = optim.Mixed.from_module(Experts(), {**MUON, "flatten": False}, ADAMW)
    assert [route.algorithm for route in opt.routing()] == ["Muon"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"hidden.*": ADAMW, "*.weight": ADAMW}, "parameter 'hidden.weight': patterns 'hidden.*', '.*weight' name it"),
        ({"router.*": ADAMW}, r"pattern 'router\.\*' names no parameter"),
        ({"hidden.bias": MUON}, "parameter 'hidden.bias': Muon only supports 2D"),
    ],
)
def test_patterns_name_a_parameter_once(patterns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Mixed.from_module(Tied(), MUON, ADAMW, patterns=patterns)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "a param_group has no 'algorithm'"),
        ({"algorithm": "Muno"}, "algorithm='Muno' is none; did you mean 'Muon'"),
        ({"algorithm": "NAdam"}, "algorithm='NAdam' is none"),
        ({"algorithm": "Muon", "betas": (0.9, 0.99)}, "a param_group of Muon has no 'betas'"),
        ({"algorithm": "AdamW", "use_muon": True}, "a param_group of AdamW has no 'use_muon'"),
        ({"algorithm": "AdamW", "momentum": 0.9}, "a param_group of AdamW has no 'momentum'"),
        ({"algorithm": "Muon", "momentum": 1.5}, r"momentum=1\.5 must be in \[0, 1\)"),
        ({"algorithm": "Muon", "in_norm": "no"}, "in_norm='no'"),
    ],
)
def test_a_group_that_no_class_takes(group: dict[str, Any], message: str) -> None:
    """Peers take unknown keys, and everything is quietly AdamW's."""
    params = parameters(shapes=((4, 6), (3, 4)))
    opt = optim.Mixed([{"params": params[:1], **ADAMW}])
    with pytest.raises((ValueError, TypeError), match=message):
        opt.add_param_group({"params": params[1:], **group})
    assert len(opt.param_groups) == 1


def test_a_parameter_has_one_group() -> None:
    params = parameters(shapes=((4, 6),))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.Mixed([(params, MUON), (params, ADAMW)])
    with pytest.raises(TypeError, match="Mixed takes param_groups"):
        optim.Mixed(params)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_routing_is_refused() -> None:
    """Nothing is loaded then: it would fail at the first step otherwise."""
    params = parameters(shapes=((4, 6), (3, 4), (5, 2)))
    opt = mixed(params)
    set_grads(params, 0)
    opt.step()
    saved, before = opt.state_dict(), everything(opt)
    other = optim.Mixed([(params[:2], ADAMW), (params[2:], MUON)])
    with pytest.raises(ValueError, match="parameter group 0 is Muon's there and AdamW's here"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match="parameter group 0 is Muon's there and that of a single class's here"):
        optim.AdamW([{"params": params[:2]}, {"params": params[2:]}]).load_state_dict(saved)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optim.Mixed([(params, ADAMW)]).load_state_dict(saved)
    assert_same(everything(opt), before)
