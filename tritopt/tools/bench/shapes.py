"""Parameters of real models, computed from their published configurations, and lists that are hard on a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

from tritopt.engine.validate import did_you_mean

Shape: TypeAlias = tuple[int, ...]


class Shapes(NamedTuple):
    """The parameters of a model, or of a part of one that says so."""

    name: str
    """Name that the table shows, such as "Llama-3-8B, 8 of 32 layers"."""
    tensors: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        """Number of elements of all parameters together."""
        return sum(map(prod, self.tensors))


class Model(NamedTuple):
    """A model whose layers are alike, so that a part of it is a fair sample of the whole."""

    name: str
    layers: int
    build: Callable[[int], list[Shape]]
    """Makes the shapes of so many layers. A model of one layer knows no part."""

    def shapes(self, layers: int | None = None) -> Shapes:
        """List the parameters with so many of the layers; None: all."""
        n = self.layers if layers is None else layers
        if not 1 <= n <= self.layers:
            raise ValueError(f"{self.name} has 1 to {self.layers} layers, not {n}")
        part = "" if n == self.layers else f", {n} of {self.layers} layers"
        return Shapes(self.name + part, tuple(self.build(n)))

    def fitting(self, available: float, per_parameter: float) -> Shapes | None:
        """Take as many layers as `available` bytes hold at so many bytes per parameter; None if not even one."""
        for layers in range(self.layers, 0, -1):
            shapes = self.shapes(layers)
            if shapes.elements * per_parameter <= available:
                return shapes
        return None


def _resnet50(layers: int) -> list[Shape]:
    def conv(out: int, into: int, size: int) -> list[Shape]:
        return [(out, into, size, size), (out,), (out,)]  # the weight, and the norm's scale and offset

    shapes, channels = conv(64, 3, 7), 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            shapes += conv(width, channels, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:
                shapes += conv(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def _bert_large(layers: int) -> list[Shape]:
    hidden, inner = 1024, 4096
    norm = [(hidden,), (hidden,)]
    square = [(hidden, hidden), (hidden,)]
    layer = [*square * 4, *norm, (inner, hidden), (inner,), (hidden, inner), (hidden,), *norm]
    return [(30522, hidden), (512, hidden), (2, hidden), *norm, *layer * layers, *square]


def _gpt2_xl(layers: int) -> list[Shape]:
    hidden = 1600
    norm = [(hidden,), (hidden,)]
    attention = [(hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    mlp = [(hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,)]
    return [(50257, hidden), (1024, hidden), *(norm + attention + norm + mlp) * layers, *norm]


def _llama3_8b(layers: int) -> list[Shape]:
    hidden, inner, keys, vocabulary = 4096, 14336, 1024, 128256
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    mlp = [(inner, hidden), (inner, hidden), (hidden, inner)]
    layer = [*attention, *mlp, (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


LARGEST_HIDDEN = 20_000
"""Most rows of a matrix between layers; vocabularies have more."""


def is_hidden_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is one for Muon. A short table of embeddings is taken for one."""
    return len(shape) == 2 and shape[0] <= LARGEST_HIDDEN


def suited(optimizer: str, shapes: Shapes) -> Shapes | None:
    """Take the tensors that an optimizer is for, a class of tritopt.optim; None if there are none."""
    if optimizer != "Muon":
        return shapes
    matrices = tuple(shape for shape in shapes.tensors if is_hidden_matrix(shape))
    return Shapes(f"{shapes.name}, matrices", matrices) if matrices else None


TINY, TINY_SIZE = 10_000, 1000
HUGE = 2**31 + 4096

MODELS = {
    "resnet50": Model("ResNet-50", 1, _resnet50),
    # The encoder with its pooler, as checkpoints have it; without the heads of pretraining.
    "bert-large": Model("BERT-large", 24, _bert_large),
    "gpt2-xl": Model("GPT-2 XL", 48, _gpt2_xl),
    "llama3-8b": Model("Llama-3-8B", 32, _llama3_8b),
    "tiny": Model(f"{TINY:,} tensors of {TINY_SIZE:,}", 1, lambda _: [(TINY_SIZE,)] * TINY),
    "huge": Model("one tensor of 2^31 + 4096", 1, lambda _: [(HUGE,)]),
}
"""Models by the name that `--shapes` takes."""


def find_models(names: Sequence[str] | None = None) -> list[str]:
    """Check names of models, and take each once (None: all); ValueError for an unknown one."""
    for name in names or ():
        if name not in MODELS:
            raise ValueError(f"unknown shapes {name!r}{did_you_mean(name, list(MODELS))} known: {', '.join(MODELS)}")
    return list(dict.fromkeys(names or MODELS))


def miniature(model: Model) -> Shapes:
    """Take a few of a model's tensors, none with more than 256 elements: for a rehearsal, where times mean nothing."""
    tensors = model.build(1)[:4]
    return Shapes(f"miniature of {model.name}", tuple(_smaller(tensor) for tensor in tensors))


def _smaller(shape: Shape) -> Shape:
    # A row of 64 elements is what 8-bit states want; one element less is a tail.
    return (min(shape[0], 4), 64) if len(shape) > 1 else (min(shape[0], 63),)
