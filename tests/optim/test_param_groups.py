"""param_groups chooses parameters by name and pattern for any torch optimizer, and refuses what is ambiguous."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import tritopt.optim
from tritopt.optim import param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


class Model(nn.Module):
    """Blocks between an embedding and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embed(x)
        for block in self.blocks:
            x = block.norm(block.fc(x))  # type: ignore[operator]
        return self.head(x)


def summary(groups: Any) -> list[tuple[str, list[str], dict[str, Any]]]:
    return [
        (
            group["name"],
            [name.replace("blocks.", "").replace("weight", "w").replace("bias", "b") for name, _ in group["params"]],
            {key: value for key, value in group.items() if key not in ("params", "name")},
        )
        for group in groups
    ]


REST = ["embed.w", "0.fc.w", "0.norm.w", "1.fc.w", "1.norm.w"]
BIASES = ["0.fc.b", "0.norm.b", "1.fc.b", "1.norm.b"]


def test_chosen_by_pattern_and_the_rest_by_default() -> None:
    groups = param_groups(Model(), {"*.bias": {"weight_decay": 0.0}}, default={"weight_decay": 0.1, "lr": 0.5})
    assert summary(groups) == [
        ("*.bias", BIASES, {"weight_decay": 0.0}),
        ("default", REST, {"weight_decay": 0.1, "lr": 0.5}),
    ]


def test_expressions_names_and_no_default() -> None:
    rules = {re.compile(r"norm"): {"lr": 0.5}, "embed.weight": {"lr": 0.25}, "*.fc.*": {"lr": 0.125}}
    assert summary(param_groups(Model(), rules)) == [
        ("norm", ["0.norm.w", "0.norm.b", "1.norm.w", "1.norm.b"], {"lr": 0.5}),
        ("embed.weight", ["embed.w"], {"lr": 0.25}),
        ("*.fc.*", ["0.fc.w", "0.fc.b", "1.fc.w", "1.fc.b"], {"lr": 0.125}),
    ]


def test_a_name_comes_before_patterns() -> None:
    rules = {"*.bias": {"lr": 0.5}, "blocks.1.fc.bias": {"lr": 0.25}}
    by_name = {name: settings for _, names, settings in summary(param_groups(Model(), rules)) for name in names}
    assert by_name["1.fc.b"] == {"lr": 0.25}
    assert by_name["0.fc.b"] == {"lr": 0.5}


def test_matched_twice_is_an_error_in_a_dict_and_in_order_in_a_list() -> None:
    rules: dict[Any, Any] = {"*.bias": {"lr": 0.5}, re.compile("norm"): {"lr": 0.25}}
    message = r"'blocks.0.norm.bias' is chosen by '\*.bias' and re.compile\('norm'\): give a list of pairs"
    with pytest.raises(ValueError, match=message):
        param_groups(Model(), rules)
    ordered = summary(param_groups(Model(), list(rules.items())))
    assert ordered[:2] == [("*.bias", BIASES, {"lr": 0.5}), ("norm", ["0.norm.w", "1.norm.w"], {"lr": 0.25})]
    turned = summary(param_groups(Model(), list(rules.items())[::-1]))
    assert turned[1] == ("*.bias", ["0.fc.b", "1.fc.b"], {"lr": 0.5})


def test_no_decay_of_what_has_one_dimension() -> None:
    rules = {"*.norm.*": {"lr": 0.5}, "blocks.0.fc.*": {"weight_decay": 0.25}, "blocks.1.fc.weight": {"lr": 0.125}}
    groups = param_groups(Model(), rules, default={"weight_decay": 0.1}, no_decay_1d=True)
    norms = ["0.norm.w", "0.norm.b", "1.norm.w", "1.norm.b"]
    assert summary(groups) == [
        ("*.norm.*, 1-d", norms, {"lr": 0.5, "weight_decay": 0.0}),
        ("blocks.0.fc.*", ["0.fc.w", "0.fc.b"], {"weight_decay": 0.25}),  # which says so itself
        ("blocks.1.fc.weight", ["1.fc.w"], {"lr": 0.125}),
        ("default", ["embed.w"], {"weight_decay": 0.1}),
        ("default, 1-d", ["1.fc.b"], {"weight_decay": 0.0}),
    ]


def test_tied_weights_are_there_once_under_either_name() -> None:
    for key in ("head.*", "embed.*", "head.weight"):
        groups = param_groups(Model(), {key: {"lr": 0.5}})
        assert summary(groups)[0] == (key, ["embed.w"], {"lr": 0.5})
        assert sum(len(group["params"]) for group in groups) == 9


@pytest.mark.parametrize("form", [dict, list, iter], ids=lambda form: form.__name__)
def test_named_parameters_do_as_well_as_a_module(form: Any) -> None:
    model = Model()
    rules = {"*.bias": {"weight_decay": 0.0}}
    expected = param_groups(model, rules)
    groups = param_groups(form(model.named_parameters()), rules)
    assert [group["params"] for group in groups] == [group["params"] for group in expected]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, tritopt.optim.AdamW, tritopt.optim.LAMB])
def test_any_torch_optimizer_takes_them(cls: Any) -> None:
    """Steps are those with groups that are written by hand."""
    models = [Model() for _ in range(2)]
    rules = {"*.bias": {"weight_decay": 0.0}, "*.norm.weight": {"lr": 0.01}}
    groups = param_groups(models[0], rules, default={"weight_decay": 0.5})
    named = dict(models[1].named_parameters())
    by_hand = [
        {"params": [p for name, p in named.items() if name.endswith("bias")], "weight_decay": 0.0},
        {"params": [p for name, p in named.items() if name.endswith("norm.weight")], "lr": 0.01},
        {"params": [p for n, p in named.items() if not n.endswith(("bias", "norm.weight"))], "weight_decay": 0.5},
    ]
    optimizers = [cls(groups, lr=0.1), cls(by_hand, lr=0.1)]
    for model, optimizer in zip(models, optimizers, strict=True):
        start = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            model(torch.arange(6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    group = optimizers[0].state_dict()["param_groups"][0]
    assert (group["name"], group["param_names"][0], group["weight_decay"]) == ("*.bias", "blocks.0.fc.bias", 0.0)
    fresh = cls(param_groups(Model(), rules, default={"weight_decay": 0.5}), lr=0.1)
    fresh.load_state_dict(optimizers[0].state_dict())
    assert len(fresh.state) == len(optimizers[0].state)


def test_prints_a_table() -> None:
    groups = param_groups(Model(), {"*.bias": {"weight_decay": 0.0, "lr": 0.5}}, default={"weight_decay": 0.1})
    lines = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in str(groups).splitlines()]
    assert ["pattern", "tensors", "elements", "settings"] in lines
    assert ["*.bias", "4", "16", "weight_decay=0.0, lr=0.5"] in lines
    assert ["default", "5", "64", "weight_decay=0.1"] in lines
    assert repr(groups) == str(groups)
    before = str(groups)
    torch.optim.SGD(groups, lr=0.1)  # which turns pairs into lists of its own
    rows = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in str(groups).splitlines()]
    assert ["*.bias", "4", "16"] in [row[:3] for row in rows]
    assert len(before.splitlines()) == len(rows)


BAD: list[tuple[Any, Any, type[Exception], str]] = [
    ({"*.biass": {}}, None, ValueError, r"'\*.biass' matches no parameter; the nearest are 'blocks.0.fc.bias'"),
    ({re.compile("nrom"): {}}, None, ValueError, r"re.compile\('nrom'\) matches no parameter; the nearest are '.*norm"),
    ([("*", {}), ("*.bias", {})], None, ValueError, r"'\*.bias' chooses no parameter that those before it leave"),
    ({3: {}}, None, TypeError, r"3 chooses no parameters: give a name, a pattern"),
    ({re.compile(b"x"): {}}, None, TypeError, r"re.compile\(b'x'\) is an expression for bytes"),
    ({"*.bias": 0.0}, None, TypeError, r"'\*.bias': 0.0 must be a dict of settings"),
    ({"*.bias": {"params": []}}, None, ValueError, r"'\*.bias': 'params' is the group's own key"),
    ({"*.bias": {"name": "x"}}, None, ValueError, r"'\*.bias': 'name' is the group's own key"),
    ({}, {"params": []}, ValueError, r"'default': 'params' is the group's own key"),
    ({}, [1], TypeError, r"'default': \[1\] must be a dict of settings"),
]


@pytest.mark.parametrize(("rules", "default", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_rules(rules: Any, default: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(Model(), rules, default=default)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.ReLU(), ValueError, r"ReLU\(\) has no parameters"),
        ([nn.Parameter(torch.zeros(1))], TypeError, r"(?s)Parameter.*: pass named_parameters\(\)"),
        ({"a": 3}, TypeError, r"\('a', 3\): pass named_parameters\(\)"),
        (nn.LazyLinear(3), ValueError, r"'weight' has no shape yet: run the model once"),
    ],
    ids=["no parameters", "no names", "no tensors", "lazy"],
)
def test_bad_models(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(model, {"*": {"lr": 0.1}})


def test_a_compiled_module_has_the_names_of_its_inside() -> None:
    inner = nn.Linear(2, 2)
    compiled: Any = torch.compile(inner, backend="eager")
    groups = param_groups(compiled, {"bias": {"weight_decay": 0.0}})
    assert [[param is inner.bias for _, param in group["params"]] for group in groups] == [[True], [False]]
    assert sorted(tritopt.module_parameters(compiled).idx2name.values()) == ["bias", "weight"]
