"""A script that is written for Gluon's Trainer, from its documented API, runs with two changed imports."""

from __future__ import annotations

import re
from typing import Any

import torch

# What is Gluon's own beside the Trainer, layers and losses, is torch's here.
SCRIPT = """
import torch
import mxnet as mx
from mxnet import gluon


def train(net, data, epochs, fname):
    schedule = mx.lr_scheduler.FactorScheduler(step=4, factor=0.5, base_lr=0.1)
    optimizer = mx.optimizer.create('sgd', learning_rate=None, momentum=0.9, wd=1e-4, lr_scheduler=schedule)
    trainer = gluon.Trainer(net, optimizer, kvstore='device', update_on_kvstore=False)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for x, y in data:
            loss = torch.nn.functional.cross_entropy(net(x), y, reduction='sum')
            loss.backward()
            trainer.step(x.shape[0])
            total += loss.item()
        losses.append(total)
        trainer.save_states(fname)
    assert isinstance(trainer.optimizer, mx.optimizer.Optimizer)
    return losses, trainer.learning_rate


def accumulate(net, data):
    for param in net.parameters():
        param.grad_req = 'add'
    trainer = gluon.Trainer(net, 'adam', {'learning_rate': 0.01, 'clip_gradient': 5.0})
    for i, (x, y) in enumerate(data):
        torch.nn.functional.cross_entropy(net(x), y, reduction='sum').backward()
        if (i + 1) % 2 == 0:
            trainer.allreduce_grads()
            gluon.utils.clip_global_norm([p.grad for p in net.parameters()], 10.0)
            trainer.update(2 * x.shape[0])
            net.zero_grad()
    trainer.set_learning_rate(trainer.learning_rate / 2)
    return trainer.learning_rate


def finetune(net, data, fname):
    trainer = gluon.Trainer(net, 'sgd', {'learning_rate': 0.05, 'momentum': 0.9})
    trainer.load_states(fname)
    x, y = data[0]
    torch.nn.functional.cross_entropy(net(x), y, reduction='sum').backward()
    trainer.step(x.shape[0], ignore_stale_grad=True)
    return trainer.optimizer.num_update
"""


def test_runs_with_two_changed_imports(tmp_path: Any) -> None:
    ported = SCRIPT.replace("import mxnet as mx", "import tritopt as mx").replace(
        "from mxnet import", "from tritopt import"
    )
    assert len(re.findall("mxnet", SCRIPT)) == 2
    assert "mxnet" not in ported
    script: dict[str, Any] = {}
    exec(compile(ported, "script", "exec"), script)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    x = torch.randn(48, 4)
    y = (x @ torch.randn(4, 3)).argmax(1)
    data = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 48, 8)]
    fname = str(tmp_path / "sgd.states")
    losses, rate = script["train"](net, data, 8, fname)
    assert losses[-1] < 0.5 * losses[0]
    assert rate == 0.1 * 0.5**11
    assert script["finetune"](net, data, fname) == 8 * 6 + 1
    assert script["accumulate"](net, data) == 0.005
