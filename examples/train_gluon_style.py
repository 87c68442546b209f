"""Gluon's image-classification loop on scikit-learn's handwritten digits: a Trainer, a metric, epochs of batches.

    pip install -e '.[examples]' && python examples/train_gluon_style.py --dtype float16
    PYTHONPATH=. python examples/train_gluon_style.py                       # from a checkout that is not installed
    torchrun --nproc-per-node 2 examples/train_gluon_style.py               # the same batches, shared by two processes

Who has trained with `mxnet.gluon` finds the structure of its examples: `train` and `test`, a `gluon.Trainer` of the
network's parameters, `trainer.step(batch_size)` after backward. The network and the loss are torch's.

* `--dtype bfloat16` (the default) and `float16` train weights of 16 bits with an fp32 master beside them.
* `float16` scales the loss, since its small gradients would underflow: `trainer.scale_loss`.
* Biases are not decayed: `trainer.collect("*.bias").setattr("wd_mult", 0)`.
* `--save-every N` writes weights and states after every N batches. Run it again, after a kill too, and it goes on where
  it was, in the middle of an epoch, to the last bit; the digest that it prints in the end says so.
* Several processes take their share of each batch; `step` sums gradients up and divides by the size of all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import tritopt as mx
from tritopt import gluon

SEED, TEST_SIZE = 0, 360


class Accuracy:
    """Share of labels that were predicted, as `gluon.metric.Accuracy` counts it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again."""
        self.right, self.total = 0, 0

    def update(self, labels: torch.Tensor, outputs: torch.Tensor) -> None:
        """Count a batch: labels [n], outputs [n, classes]."""
        self.right += int((outputs.argmax(dim=1) == labels).sum())
        self.total += len(labels)

    def get(self) -> tuple[str, float]:
        """Name and value."""
        return "accuracy", self.right / max(self.total, 1)


class Data:
    """The digits, standardised: images [n, 64] and labels [n], in batches that follow from the epoch's number.

    Args:
        dtype: of the images.
        batch_size: images of a batch, over all processes.
    """

    def __init__(self, dtype: torch.dtype, batch_size: int) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.data).float()
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
        test, train = order[:TEST_SIZE], order[TEST_SIZE:]
        mean, deviation = images[train].mean(), images[train].std()
        images = ((images - mean) / deviation).to(dtype)
        self.train, self.test = (images[train], labels[train]), (images[test], labels[test])
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches of an epoch; the rest is left out."""
        return len(self.train[0]) // self.batch_size

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's share of each batch of an epoch, from the `first` on."""
        images, labels = self.train
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED + 1 + epoch))
        for i in range(first, len(self)):
            share = order[i * self.batch_size : (i + 1) * self.batch_size][rank() :: n_processes()]
            yield images[share], labels[share]


def test(net: nn.Module, data: Data) -> tuple[str, float]:
    """Accuracy on the images that were not trained on."""
    metric = Accuracy()
    with torch.no_grad():
        images, labels = data.test
        metric.update(labels, net(images))
    return metric.get()


def train(net: nn.Module, data: Data, arguments: argparse.Namespace) -> gluon.Trainer:
    """Train for that many epochs in all, from what was saved if there is something."""
    dtype = next(net.parameters()).dtype
    trainer = gluon.Trainer(
        net,
        "adam",
        {"learning_rate": arguments.lr, "wd": arguments.wd, "multi_precision": dtype != torch.float32},
        kvstore="device",
        max_grad_norm=5.0,
        loss_scaler=mx.LossScaler() if dtype == torch.float16 else None,
    )
    trainer.collect("*.bias").setattr("wd_mult", 0)
    metric = Accuracy()
    loss = nn.CrossEntropyLoss(reduction="sum")
    done = resume(net, trainer, arguments.folder)

    for epoch in range(done // len(data), arguments.epochs):
        metric.reset()
        for x, y in data.batches(epoch, first=done - epoch * len(data)):
            output = net(x)
            L = loss(output.float(), y)
            if trainer.loss_scaler is None:
                L.backward()
            else:
                with trainer.scale_loss(L) as scaled:
                    scaled.backward()
            # The gradient is a sum over the samples of all processes, so it is divided by their number.
            trainer.step(data.batch_size)
            metric.update(y, output)
            done += 1
            if arguments.save_every and done % arguments.save_every == 0 and rank() == 0:
                save(net, trainer, arguments.folder, done)
            if done == arguments.stop_after:
                return trainer
        name, value = metric.get()
        say(f"[Epoch {epoch}] training: {name}={value:.4f}")
        name, value = test(net, data)
        say(f"[Epoch {epoch}] validation: {name}={value:.4f}")
    return trainer


def save(net: nn.Module, trainer: gluon.Trainer, folder: Path, done: int) -> None:
    """Write states and weights after so many batches; the weights last, so that who finds them finds both."""
    trainer.save_states(folder / f"digits-{done:06d}.states")
    part = folder / "digits.part"
    torch.save(net.state_dict(), part)
    os.replace(part, folder / f"digits-{done:06d}.params")
    for name in saved(folder)[:-1]:
        (folder / f"{name}.params").unlink()
        (folder / f"{name}.states").unlink()


def saved(folder: Path) -> list[str]:
    """Names of what was saved, the last at the end."""
    return sorted(path.stem for path in folder.glob("digits-*.params") if path.with_suffix(".states").exists())


def resume(net: nn.Module, trainer: gluon.Trainer, folder: Path) -> int:
    """Load what was saved last; returns the number of batches that it has seen."""
    names = saved(folder)
    if not names:
        return 0
    net.load_state_dict(torch.load(folder / f"{names[-1]}.params", weights_only=True))
    trainer.load_states(folder / f"{names[-1]}.states")
    done = int(re.sub(r"\D", "", names[-1]))
    say(f"resumed after {done} batches, digest {digest(net)}")
    return done


def digest(net: nn.Module) -> str:
    """Digest of the weights: equal only if all their bits are."""
    digest_of_all = hashlib.sha256()
    for param in net.parameters():
        digest_of_all.update(param.detach().view(-1).view(torch.uint8).numpy().tobytes())
    return digest_of_all.hexdigest()[:16]


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes() -> int:
    """Number of all."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line: str) -> None:
    """Print in the first process."""
    if rank() == 0:
        print(line, flush=True)


def make_net(dtype: torch.dtype) -> nn.Module:
    """Three dense layers, as in Gluon's example for MNIST; the same weights in every process."""
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return net.to(dtype)


def main(argv: Sequence[str] | None = None) -> tuple[nn.Module, gluon.Trainer, float]:
    """Train, and print accuracies and the digest; returns the accuracy on test images with what was trained."""
    parser = argparse.ArgumentParser(
        description="Gluon's loop on handwritten digits.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of weights")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images, over all processes")
    parser.add_argument("--epochs", type=positive_int, default=6, help="in all, earlier runs included")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate, per update")
    parser.add_argument("--wd", type=float, default=1e-3, help="weight decay")
    parser.add_argument("--save-every", type=int, default=0, help="batches between saves; 0: none")
    parser.add_argument("--stop-after", type=int, default=0, help="batches; 0: at the end")
    parser.add_argument("--folder", type=Path, default=Path(), help="where it is saved, and looked for")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder} must exist")
    torch.set_num_threads(1)  # matrices this small take longer on several
    joins = "RANK" in os.environ and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo")
    if arguments.batch_size % n_processes():
        parser.error(f"--batch-size {arguments.batch_size} must be a multiple of {n_processes()} processes")
    try:
        dtype = getattr(torch, arguments.dtype)
        net, data = make_net(dtype), Data(dtype, arguments.batch_size)
        trainer = train(net, data, arguments)
        accuracy = test(net, data)[1]
        say(f"digest {digest(net)}")
        return net, trainer, accuracy
    finally:
        if joins:
            dist.destroy_process_group()


def positive_int(text: str) -> int:
    """An argument that is at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


if __name__ == "__main__":
    main()
