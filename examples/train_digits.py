"""Trains a small network on scikit-learn's handwritten digits in four precisions: what an fp32 master weight is for.

    pip install -e '.[examples]' && python examples/train_digits.py
    PYTHONPATH=. python examples/train_digits.py                            # from a checkout that is not installed

All four runs see the same data in the same order and start from the same weights:

    fp32                fp32 weights
    bf16, fp32 master   bf16 weights, multi_precision=True
    bf16, no master     bf16 weights and optimizer states
    fp16, fp32 master   fp16 weights, multi_precision=True, and a dynamic loss scale through rescale_grad

AdamW moves a weight by about the learning rate, here 1e-4. Between 1/16 and 1/8 the next bf16 number is 5e-4 away, so
the sum rounds back to the old weight: without a master, only weights below 1/32 learn. A master collects such updates
until they show in the 16-bit weight. With `--learning-rate 1e-3` most updates are large enough for bf16, and all runs
reach the same accuracy, though not the same loss.

Takes seconds on a CPU, where the reference step runs; on a GPU each step is one fused launch.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import tritopt

SPLIT_SEED = 0
"""Seed of the train/test split, which is the same whatever `--seed` is."""
TEST_SIZE = 360
HIDDEN = 128
BATCH_SIZE = 32


class Recipe(NamedTuple):
    """One way to train."""

    name: str
    dtype: torch.dtype
    line: str
    """Colour and dashes in the plot, as matplotlib abbreviates them."""
    multi_precision: bool = False
    scales_loss: bool = False


RECIPES = (
    # Three curves coincide: a broad one below a dashed and a dotted one lets all be seen.
    Recipe("fp32", torch.float32, "C7-"),
    Recipe("bf16, fp32 master", torch.bfloat16, "C0--", multi_precision=True),
    Recipe("bf16, no master", torch.bfloat16, "C3-"),
    Recipe("fp16, fp32 master", torch.float16, "k:", multi_precision=True, scales_loss=True),
)


class Digits(NamedTuple):
    """Standardised images [n, 64] and their labels [n]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


class LossScale:
    """A factor of the loss that keeps small fp16 gradients from underflowing; halved whenever one overflows.

    It starts far too large and only shrinks, which is enough for a short run. All of it stays on the device: the host
    never waits to hear whether a gradient is finite. A skipped update still counts, for Adam's bias correction say.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.tensor(2.0**24, device=device)
        self.n_skipped = torch.tensor(0, device=device)

    def rescale_grad(self, grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Factor that undoes the scale, for `Optimizer.rescale_grad`; after an overflow NaN, which skips the update."""
        finite = torch.stack([grad.isfinite().all() for grad in grads if grad is not None]).all()
        rescale = torch.where(finite, 1 / self.value, math.nan)
        self.value = torch.where(finite, self.value, self.value / 2)
        self.n_skipped += ~finite
        return rescale


class Run(NamedTuple):
    """Result of training by one recipe."""

    recipe: Recipe
    accuracy: float
    """Share of the test images, in percent."""
    losses: list[float]
    """Cross-entropy over the training images, before the first epoch and after each."""
    loss_scale: LossScale | None

    @property
    def label(self) -> str:
        """Text of the plot's legend."""
        return f"{self.recipe.name}: {self.accuracy:.1f} % of test images right"


def load_data(device: torch.device) -> Digits:
    """The 1797 digits, shuffled, split and standardised per pixel by what the training images say."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[:TEST_SIZE], order[TEST_SIZE:]
    deviation = images[train].std(dim=0)
    deviation[deviation == 0] = 1  # pixels that are blank in every training image
    images = (images - images[train].mean(dim=0)) / deviation
    return Digits(*(tensor.to(device) for tensor in (images[train], labels[train], images[test], labels[test])))


def make_model(seed: int) -> nn.Module:
    """An fp32 network on the CPU; the seed decides its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, in fp32 from the logits on: its softmax is no place for 8 significant bits."""
    return nn.functional.cross_entropy(model(images).float(), labels)


def train(recipe: Recipe, data: Digits, optimizer: str, learning_rate: float, epochs: int, seed: int) -> Run:
    """One run from fresh weights."""
    device = data.train_images.device
    images, test_images = data.train_images.to(recipe.dtype), data.test_images.to(recipe.dtype)
    model = make_model(seed).to(device, recipe.dtype)
    opt = tritopt.create(optimizer, learning_rate=learning_rate, multi_precision=recipe.multi_precision)
    params, updater = tritopt.module_parameters(model), tritopt.get_updater(opt)
    scale = LossScale(device) if recipe.scales_loss else None
    shuffling = torch.Generator().manual_seed(seed)

    with torch.no_grad():
        losses = [loss_of(model, images, data.train_labels).item()]
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=shuffling).to(device)
        for batch in torch.split(order, BATCH_SIZE):
            model.zero_grad()
            loss = loss_of(model, images[batch], data.train_labels[batch])
            torch.autograd.backward(loss if scale is None else loss * scale.value)
            if scale is not None:
                opt.rescale_grad = scale.rescale_grad(params.grads())
            updater(params.indices, params.grads(), params.weights)
        with torch.no_grad():
            losses.append(loss_of(model, images, data.train_labels).item())

    with torch.no_grad():
        right = model(test_images).argmax(dim=1) == data.test_labels
    return Run(recipe, 100 * right.float().mean().item(), losses, scale)


def train_all(data: Digits, optimizer: str, learning_rate: float, epochs: int, seed: int) -> list[Run]:
    """A run of each recipe."""
    with warnings.catch_warnings():
        # tritopt warns of every low-precision parameter without a master. One run here has none on purpose, to show
        # what the warning is about, and the table's caption says it; all other warnings get through.
        warnings.filterwarnings("ignore", message=r"\w+ accumulates in torch\.bfloat16 ", category=UserWarning)
        runs = track(RECIPES, "Training", transient=True)
        return [train(recipe, data, optimizer, learning_rate, epochs, seed) for recipe in runs]


def table_of(runs: Sequence[Run], title: str) -> Table:
    """The runs' accuracies and losses."""
    notes = ["no master: updates below half a bf16 ulp are lost"]
    for scale in (run.loss_scale for run in runs):
        if scale is not None:
            notes.append(f"fp16: loss scale {scale.value:g} after {int(scale.n_skipped)} skipped updates")
    table = Table(title=title, caption="\n".join(notes))
    table.add_column("weights")
    table.add_column("test accuracy", justify="right")
    table.add_column("final training loss", justify="right")
    for run in runs:
        table.add_row(run.recipe.name, f"{run.accuracy:.1f} %", f"{run.losses[-1]:.4f}")
    return table


def save_plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Training loss by epoch."""
    figure = Figure(figsize=(8, 5), layout="constrained")  # without pyplot, PNGs are drawn by Agg: no display is needed
    axes = figure.add_subplot()
    for run in runs:
        width = 5 if run.recipe.dtype == torch.float32 else 2
        axes.plot(run.losses, run.recipe.line, label=run.label, linewidth=width)
    axes.set(title=title, xlabel="epoch", ylabel="training loss: cross-entropy (nats, log scale)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the program on a value that would fail later."""
    parser = argparse.ArgumentParser(
        description="Digits in four precisions: what an fp32 master weight is for.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--optimizer", default="adamw", help=f"one of {', '.join(tritopt.names())}")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="per update")
    parser.add_argument("--epochs", type=positive_int, default=40, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights and the order of the data")
    parser.add_argument("--plot", type=png_path, default="digits.png", help="where the loss plot goes")
    parser.add_argument(
        "--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu", help="to train on"
    )
    arguments = parser.parse_args(argv)
    try:
        tritopt.create(arguments.optimizer, learning_rate=arguments.learning_rate)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def positive_int(text: str) -> int:
    """An argument that is at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def png_path(text: str) -> Path:
    """An argument that a plot can be written to."""
    path = Path(text)
    if path.suffix != ".png" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} must be a .png file in a folder that exists")
    return path


def available_device(text: str) -> torch.device:
    """An argument that tensors can be put on."""
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:  # a torch that is built without CUDA asserts
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train, print the table, save the plot."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)  # matrices this small take longer on several
    data = load_data(arguments.device)
    runs = train_all(data, arguments.optimizer, arguments.learning_rate, arguments.epochs, arguments.seed)
    title = (
        f"Digits: {arguments.optimizer}, learning rate {arguments.learning_rate:g}\n"
        f"{arguments.epochs} epochs, seed {arguments.seed}, {arguments.device}"
    )
    Console().print(table_of(runs, title))
    save_plot(runs, title, arguments.plot)
    print(f"Loss plot: {arguments.plot}")
    return runs


if __name__ == "__main__":
    main()
