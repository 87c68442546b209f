"""torch.distributed.checkpoint in one process: ours and torch's, there and back, flattened or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.optim.training import CLASSES
from tritopt import optim

pytestmark = [
    pytest.mark.xdist_group("dcp"),
    # Of torch itself, about saving in one process.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch"),
]
NAMES = [cls.__name__ for cls in CLASSES if hasattr(torch.optim, cls.__name__)]
FLAT = pytest.mark.parametrize("is_flat", [False, True], ids=["nested", "flat"])


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(cls: Any, n_steps: int = 1, **options: Any) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=cls is not optim.GroupAdaGrad)  # which takes matrices
    opt = cls(model.parameters(), **{"lr": 0.01, **({"fused": False} if cls in CLASSES else {}), **options})
    for step in range(n_steps):
        torch.manual_seed(step)
        model(torch.randn(2, 4)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def train_on(model: torch.nn.Module, opt: Any) -> list[torch.Tensor]:
    torch.manual_seed(100)
    model(torch.randn(2, 4)).square().sum().backward()
    opt.step()
    return [param.detach().clone() for param in model.parameters()]


def through(source: Any, target: Any, path: Path, options: StateDictOptions) -> None:
    """What DCP saves of one optimizer, loaded into another as its documentation says."""
    model, opt = source
    dcp.save({"opt": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=path)
    model, opt = target
    content: Any = {"opt": get_optimizer_state_dict(model, opt, options=options)}
    dcp.load(content, checkpoint_id=path)
    set_optimizer_state_dict(model, opt, content["opt"], options=options)


@FLAT
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_with_torch(name: str, direction: str, is_flat: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    classes = [getattr(torch.optim, name), getattr(optim, name)]
    saver, loader = classes if direction == "from torch" else classes[::-1]
    kinds: list[dict[str, Any]] = [{}]
    if name == "SGD":
        kinds.append({"momentum": 0.9})
    for i, kind in enumerate(kinds):
        source, target = trained(saver, 3, **kind), trained(loader, 1, **kind)
        through(source, target, tmp_path / str(i), options)
        target[0].load_state_dict(source[0].state_dict())
        expected, found = train_on(*source), train_on(*target)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@FLAT
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_saving_and_loading_is_the_identity(cls: Any, is_flat: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    source, target = trained(cls, 3), trained(cls, 1)
    target[1].load_state_dict(copy.deepcopy(target[1].state_dict()))  # one that has loaded before
    through(source, target, tmp_path, options)
    saved, loaded = source[1].state_dict(), target[1].state_dict()
    assert saved["param_groups"] == loaded["param_groups"]
    assert saved["state"].keys() == loaded["state"].keys()
    for key, state in saved["state"].items():
        assert state.keys() == loaded["state"][key].keys()
        for name, value in state.items():
            assert torch.equal(value, loaded["state"][key][name])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_key_comes_or_goes(cls: Any) -> None:
    opt = trained(cls)[1]
    before = opt.state_dict()
    for other in (copy.deepcopy(opt), trained(cls)[1]):
        other.load_state_dict(copy.deepcopy(before))
        after = other.state_dict()
        assert [group.keys() for group in after["param_groups"]] == [group.keys() for group in before["param_groups"]]
        assert {i: state.keys() for i, state in after["state"].items()} == {
            i: state.keys() for i, state in before["state"].items()
        }


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_parameters_without_a_gradient_yet(name: str) -> None:
    found = []
    for module in (torch.optim, optim):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        opt = getattr(module, name)(model.parameters(), lr=0.1)
        for param in model[0].parameters():
            param.grad = torch.ones_like(param)
        opt.step()
        opt.zero_grad()
        saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
        set_optimizer_state_dict(model, getattr(module, name)(model.parameters(), lr=0.1), saved)
        found.append({key: sorted(state) for key, state in saved["state"].items()})  # type: ignore[union-attr]
    assert found[0] == found[1]


@pytest.mark.parametrize("master", ["auto", "fp32", "kahan", "split8"])
def test_what_a_checkpoint_lacks_is_not_an_older_masters(master: str, tmp_path: Path) -> None:
    """With allow_partial_load, states that are not in the checkpoint stay: a master would belong to older weights."""
    options = StateDictOptions(strict=False)
    model, _ = trained(torch.optim.AdamW)
    model.to(torch.bfloat16)
    source = torch.optim.AdamW(model.parameters(), lr=0.01)
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.01)
    source.step()
    dcp.save({"opt": get_optimizer_state_dict(model, source)}, checkpoint_id=tmp_path)
    other, opt = trained(optim.AdamW, 0, master=master)
    other.to(torch.bfloat16)
    for step in range(3):
        for param in other.parameters():
            param.grad = torch.full_like(param, 0.3 * (step + 1))
        opt.step()
    content: Any = {"opt": get_optimizer_state_dict(other, opt, options=options)}
    dcp.load(content, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    other.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="no master"):
        set_optimizer_state_dict(other, opt, content["opt"], options=options)
    for weight, param in zip(opt.master_weights(), model.parameters(), strict=True):
        assert torch.equal(weight, param.detach().float())
