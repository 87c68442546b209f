"""The column "sharded" of the table of support is true: what it says is sent is sent, and nothing else."""

from __future__ import annotations

import pytest
import torch

import tritopt
from tests.support.layouts import Communication, Pair, layouts, spread
from tests.support.training import options_of
from tests.support.world import REASON, World
from tritopt.tools.support import LEGEND, MXNET, supported

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.skipif(bool(REASON), reason=str(REASON))]
SHARDED = {(record.face, record.optimizer): record.sharded for record in supported()}


def sent_by(name: str, layout: str, fused: bool | None = None) -> list[str]:
    """Collectives of a step of two matrices."""
    cls = getattr(tritopt.optim, name)
    shapes = [(4, 6), (2, 8)]
    pair = Pair(cls, [layouts()[layout]] * len(shapes), shapes, **options_of(cls), fused=fused)
    pair.set_grads()
    with Communication() as seen:
        pair.many.step()
    calls: list[str] = seen.calls
    return calls


def check_sent(sharded: dict[str, str]) -> None:
    for name, word in sharded.items():
        by_rows, by_columns = sent_by(name, "rows"), sent_by(name, "columns")
        if word == "local":
            assert by_rows == by_columns == [], name
        elif word == "sums":
            assert set(by_rows) == set(by_columns) == {"allreduce_"}, name
        elif word == "rows":
            assert by_rows == [], name
            assert by_columns != [], name
        elif word == "matrices":
            assert set(by_rows) == set(by_columns) == {"alltoall_base_"}, name
        else:
            assert word == "DTensor", name
            assert by_rows != [], name
            with pytest.warns(UserWarning, match="no kernel for tensors that are sharded over processes"):
                sent_by(name, "rows", fused=True)


def test_what_is_sent(worlds: dict[int, World]) -> None:
    sharded = {name: word for (face, name), word in SHARDED.items() if face != MXNET}
    assert {*sharded.values(), "no"} == set(LEGEND["sharded"])
    worlds[2].run(check_sent, sharded)


def check_refused(names: list[str]) -> None:
    weight = spread(torch.ones(4, 6), layouts()["rows"])
    for name in names:
        opt = tritopt.create(name)
        state = opt.create_state(0, torch.ones(4, 6))
        for pair in ((weight, weight.clone()), (torch.ones(4, 6), weight)):
            with pytest.raises(TypeError, match=r"is a DTensor.*take the class of tritopt\.optim"):
                opt.update([0], [pair[0]], [pair[1]], [state])


def test_what_mxnet_refuses(worlds: dict[int, World]) -> None:
    names = [name for (face, name), word in SHARDED.items() if face == MXNET and word == "no"]
    assert names == tritopt.names()
    worlds[1].run(check_refused, names)
