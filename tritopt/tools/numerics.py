"""What a storage format costs and what it loses: `tritopt numerics`.

Every format trains on two problems, and so does a float64 truth. The digits are a real network, in a closed loop: its
gradients are those of its own weights. The stress is synthetic: gradients that do not depend on the weights, the same
for all formats and exact in each of them, so that what differs is what was stored. One optimizer has all its cases.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby, product
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from tritopt import optim
from tritopt.engine import validate
from tritopt.tools.check import device

STEPS = 3000
DIGITS_LR = 1e-4

# The formats.

WEIGHTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "master": (torch.bfloat16, {"master": "fp32"}),
    "split16": (torch.bfloat16, {"master": "split16"}),
    "split8": (torch.bfloat16, {"master": "split8"}),
    "kahan": (torch.bfloat16, {"master": "kahan"}),
    "stochastic": (torch.bfloat16, {"master": "stochastic"}),
    "none": (torch.bfloat16, {"master": None}),
    "fp16-master": (torch.float16, {"master": "fp32"}),
    "fp16-kahan": (torch.float16, {"master": "kahan"}),
}
"""Name: dtype of the weights and gradients, and how the weights' master is kept."""
STATES: dict[str, dict[str, Any]] = {
    "": {},
    "bf16": {"state_dtype": "bf16"},
    "int8": {"state_dtype": "int8"},
    "fp8": {"state_dtype": "fp8"},
    "fp16": {"state_dtype": "fp16"},
    "int8/bf16": {"state_dtype": {"exp_avg": "int8", "exp_avg_sq": "bf16"}},
    "int8/fp8": {"state_dtype": {"exp_avg": "int8", "exp_avg_sq": "fp8"}},
}
"""Name: how states are kept. The first one is what the weights' format brings along; those with a stroke are Adam's."""
BY_DEFAULT = (
    "fp32", "master", "split16", "split8", "kahan", "stochastic", "none", "fp16-master", "fp16-kahan",
    "fp32+bf16", "fp32+fp16", "fp32+int8", "fp32+int8/bf16", "fp32+int8/fp8", "fp32+fp8",
    "split16+bf16", "split16+int8", "split8+bf16", "split8+int8", "split8+fp8", "stochastic+int8",
)  # fmt: skip


class StorageFormat(NamedTuple):
    """How weights and states are stored."""

    name: str
    """A key of WEIGHTS, and after a plus one of STATES."""
    dtype: torch.dtype
    """Of weights and gradients."""
    arguments: dict[str, Any]
    """Of the optimizer."""


TRUTH = StorageFormat("fp64", torch.float64, {})
FORMATS = {
    name: StorageFormat(name, dtype, {**weights, **states})
    for (weight, (dtype, weights)), (state, states) in product(WEIGHTS.items(), STATES.items())
    for name in [f"{weight}+{state}" if state else weight]
}
"""By name: every format of weights with every one of states."""


def find_formats(names: Sequence[str] | None = None) -> list[StorageFormat]:
    """The formats of these names (None: BY_DEFAULT); ValueError for an unknown one."""
    for name in names or ():
        if name not in FORMATS:
            known = f"{', '.join(WEIGHTS)}, and after a plus {', '.join(filter(None, STATES))}"
            raise ValueError(f"unknown format {name!r}{validate.did_you_mean(name, list(FORMATS))} known: {known}")
    return [FORMATS[name] for name in dict.fromkeys(names or BY_DEFAULT)]


def find_optimizer(name: str) -> type[optim.Optimizer]:
    """The class of tritopt.optim that is called so, whatever the case; ValueError if there is none."""
    found = {key.lower(): value for key, value in vars(optim).items() if _is_public_optimizer(value)}
    if name.lower() not in found:
        known = [cls.__name__ for cls in found.values()]
        raise ValueError(f"unknown optimizer {name!r}{validate.did_you_mean(name, known)} known: {', '.join(known)}")
    cls: type[optim.Optimizer] = found[name.lower()]
    return cls


def _is_public_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, optim.Optimizer) and value is not optim.Optimizer


# What comes out.


@dataclass(frozen=True)
class Row:
    """What one format made of one problem. None: it says nothing here, or the format was refused."""

    optimizer: str
    format: str
    arguments: dict[str, Any]
    """What chooses the format."""
    weight_dtype: str
    problem: str
    """digits or stress."""
    case: str
    steps: int
    lr: float
    weight_decay: float = 0.0
    gradient_rms: float | None = None
    resident: float | None = None
    """Bytes per parameter of weight, gradient and states, of the tensors that were allocated."""
    moved: float | None = None
    """Bytes per parameter that a step reads and writes, likewise."""
    kept: float | None = None
    """Share of the truth's movement: that part of the movement which goes along it. 1 is right."""
    drift: float | None = None
    """Distance from the truth, as a share of the truth's movement. 0 is right."""
    update: float | None = None
    """Rms of single updates, as a multiple of the truth's. Noise of the rounding counts. 1 is right."""
    remains: float | None = None
    """Share of the first weight that is left. Of the truth, exp(-lr decay steps) or so where there is only decay."""
    loss: float | None = None
    """Cross-entropy over the training images, after the last step."""
    accuracy: float | None = None
    """Share of the test images."""
    refused: str | None = None
    """Why the optimizer does not take the format."""


class Bytes(NamedTuple):
    """Per parameter."""

    resident: float
    moved: float


def counted_bytes(opt: optim.Optimizer) -> Bytes:
    """Of the tensors that an optimizer holds after a step: parameters, gradients and states.

    What a step moves is what the phases of its kernel say they load and store of these tensors;
    tests/kernels/test_traffic.py counts that they do.
    """
    resident = moved = 0.0
    n_elements = 0
    for group in opt.param_groups:
        rule = opt.rule_of(group)
        for param in group["params"]:
            fmt = opt.layout_of(param, group).format
            n_elements += param.numel()
            kept = {key: value for key, value in opt.state[param].items() if getattr(value, "ndim", 0)}
            planes = [param.nbytes, *[kept[name].nbytes for name in kept if name == fmt.companion]]
            states = sum(tensor.nbytes for tensor in kept.values()) - sum(planes[1:])
            grad = param.dtype.itemsize * param.numel()
            resident += sum(planes) + grad + states
            loaded = sum(size for size, is_read in zip(planes, fmt.plane_reads, strict=True) if is_read)
            for phase in rule.phases:
                moved += sum(phase.traffic((loaded, sum(planes)), grad, states))
    return Bytes(resident / n_elements, moved / n_elements)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Movement(NamedTuple):
    """How far weights went, beside the truth."""

    kept: float | None
    drift: float | None

    @classmethod
    def of(cls, weights: torch.Tensor, truth: torch.Tensor, start: torch.Tensor) -> Movement:
        """Of one tensor. None where the truth does not move."""
        moved, expected = weights.double() - start.double(), truth.double() - start.double()
        size = float(expected.square().sum())
        if size == 0:
            return cls(None, None)
        kept, drift = float((moved * expected).sum()) / size, math.sqrt(float((moved - expected).square().sum()) / size)
        return cls(kept, drift)


# The stress.

SHAPE = (64, 64)
MEAN, SPREAD = 0.6, 0.8
"""Of the gradients, in units of their rms. The mean's sign is an element's own."""
OUTLIER = 1e4
OUTLIERS = math.prod(SHAPE) // 256
"""Elements that are outliers at a time."""
DECAY_STEPS = 1000
N_PROBES = 24
"""Single updates that are looked at."""
LOSS_SCALE = 2.0**19
"""Of fp16 gradients: the largest of 1e-2 or so, and of 1e-8, are normal numbers then."""


class Case(NamedTuple):
    """One kind of the stress's weights and gradients."""

    name: str
    gradient_rms: float
    """Of those that are not outliers."""
    lr: float
    weight_decay: float = 0.0
    outliers: str | None = None
    """None, "same": elements that always are, or "any": others in each step."""
    max_steps: int | None = None


GRADIENTS = {f"gradient rms 1e-{i}": float(f"1e-{i}") for i in range(2, 9)}
RATES = {f"lr 1e-{i}": float(f"1e-{i}") for i in range(2, 7)}
DIGITS, DECAY = "digits", "decay alone"
SAME_OUTLIERS, ANY_OUTLIERS = "outliers, the same elements", "outliers, any element"
CASES = (
    *(Case(name, rms, 1e-3) for name, rms in GRADIENTS.items()),
    Case(SAME_OUTLIERS, 1e-6, 1e-3, outliers="same"),
    Case(ANY_OUTLIERS, 1e-6, 1e-3, outliers="any"),
    *(Case(name, 1e-3, lr) for name, lr in RATES.items()),
    Case(DECAY, 0.0, 1e-3, weight_decay=0.1, max_steps=DECAY_STEPS),
)
"""Of the stress. Weights are around 1, so that a learning rate is about an update's share of the weight."""


class Stress:
    """The weights to start from, and the gradients of each step: bf16 numbers, the same whatever the format."""

    def __init__(self, cases: Sequence[Case], steps: int) -> None:
        self.cases, self.steps = list(cases), steps
        self._random = torch.Generator("cpu").manual_seed(0)  # on the CPU: the same numbers on every machine
        weights = torch.empty(SHAPE, dtype=torch.float32, device="cpu").uniform_(-1, 1, generator=self._random).exp2()
        self.start = (weights * self._signs()).bfloat16().to(device())
        self._mean = (self._signs() * MEAN).to(device())
        places = torch.randperm(math.prod(SHAPE), generator=self._random, dtype=torch.int64, device="cpu")[:OUTLIERS]
        outliers = torch.ones(math.prod(SHAPE), dtype=torch.float32, device="cpu").index_fill_(0, places, OUTLIER)
        outliers = outliers.view(SHAPE).to(device())
        ones = torch.ones(SHAPE, dtype=torch.float32, device=device())
        self._scale = torch.stack([c.gradient_rms * (outliers if c.outliers == "same" else ones) for c in self.cases])
        self._moving = [i for i, case in enumerate(self.cases) if case.outliers == "any"]
        self._outliers = outliers.view(-1)
        self._normal = torch.randn(
            (min(steps, 512), *SHAPE), generator=self._random, dtype=torch.float32, device="cpu"
        ).to(device())

    def _signs(self) -> torch.Tensor:
        return torch.randint(0, 2, SHAPE, generator=self._random, dtype=torch.float32, device="cpu") * 2.0 - 1.0

    def gradients(self, step: int) -> torch.Tensor:
        """fp32 [cases, *SHAPE], of bf16 numbers."""
        # Numbers come again after 512 steps, each at another element.
        turn, at = divmod(step, len(self._normal))
        normal = self._normal[at].view(-1).roll(turn * 509).view(SHAPE)
        grads = self._scale * (self._mean + SPREAD * normal)
        for i in self._moving:
            grads[i] *= self._outliers.roll(step * 1021).view(SHAPE)
        return grads.bfloat16().float()


class Trained(NamedTuple):
    """What a format made of the stress."""

    weights: list[torch.Tensor]
    """After the last step, as the arithmetic sees them."""
    updates: list[float]
    """Squares of single ones, of each case, added up."""
    counted: Bytes


@one_thread()
def train_stress(cls: type[optim.Optimizer], fmt: StorageFormat, stress: Stress) -> Trained:
    """All cases, in one optimizer."""
    grads = torch.zeros(len(stress.cases), *SHAPE, dtype=fmt.dtype, device=device())
    packs = _packs(cls, stress.cases)
    params = [torch.nn.Parameter(stress.start.to(fmt.dtype).repeat(len(pack), 1)) for pack in packs]
    for param, grad in zip(params, grads.split([len(pack) for pack in packs]), strict=True):
        param.grad = grad.view(param.shape)
    groups = [
        {"params": [param], "lr": pack[0].lr, "weight_decay": pack[0].weight_decay}
        for param, pack in zip(params, packs, strict=True)
    ]
    opt = make_optimizer(cls, groups, fmt)
    scale = LOSS_SCALE if fmt.dtype == torch.float16 else 1.0
    if scale != 1.0:
        opt.grad_scale = torch.tensor(scale, dtype=torch.float32, device=device())  # type: ignore[attr-defined]
    probes = {round((i + 1) * stress.steps / N_PROBES) - 1 for i in range(N_PROBES)}
    updates = []
    for step in range(stress.steps):
        for param, pack in zip(params, packs, strict=True):
            if step == pack[0].max_steps:
                param.grad = None
        grads.copy_(stress.gradients(step) * scale)
        before = _weights_of(opt) if step in probes else None
        opt.step()
        if before is not None:
            updates.append((_weights_of(opt) - before).view(len(grads), -1).square().sum(dim=1))
    weights = list(_weights_of(opt).view(len(grads), *SHAPE))
    return Trained(weights, torch.stack(updates).sum(dim=0).tolist(), counted_bytes(opt))


def _packs(cls: type[optim.Optimizer], cases: Sequence[Case]) -> list[list[Case]]:
    """Those that share a parameter, which is faster: of one rate, where elements know nothing of each other."""
    if any(phase.sums_elements for phase in cls.rule().phases):
        return [[case] for case in cases]
    return [list(pack) for _, pack in groupby(cases, lambda case: (case.lr, case.weight_decay, case.max_steps))]


def make_optimizer(cls: type[optim.Optimizer], params: Any, fmt: StorageFormat, **arguments: Any) -> optim.Optimizer:
    """With kernels on a GPU; elsewhere the reference, which has the same bits and is faster than the interpreter."""
    make: Callable[..., optim.Optimizer] = cls
    fused = None if device().type == "cuda" else False
    eps = inspect.signature(cls).parameters.get("eps")
    if eps is not None and isinstance(eps.default, tuple) and eps.default[0] is None:
        # Adafactor's goes by the weights' dtype, and all formats are to compute the same.
        arguments["eps"] = (torch.finfo(torch.float32).eps, *eps.default[1:])
    return make(params, fused=fused, **arguments, **fmt.arguments)


def _weights_of(opt: optim.Optimizer) -> torch.Tensor:
    """All, one after another, fp64."""
    return torch.cat([weight.to(torch.float64).flatten() for weight in opt.master_weights()])


def stress_rows(cls: type[optim.Optimizer], fmt: StorageFormat, stress: Stress, truth: Trained) -> Iterator[Row]:
    """A row for each case."""
    trained, refused = (truth, None) if fmt is TRUTH else _unless_refused(lambda: train_stress(cls, fmt, stress))
    for i, case in enumerate(stress.cases):
        found: dict[str, Any] = {"refused": refused}
        if trained is not None:
            movement = Movement.of(trained.weights[i], truth.weights[i], stress.start)
            start = stress.start.double()
            found = {
                **trained.counted._asdict(),
                **movement._asdict(),
                "update": math.sqrt(trained.updates[i] / truth.updates[i]) if truth.updates[i] else None,
                "remains": float((trained.weights[i] * start).sum() / start.square().sum()),
            }
        yield Row(
            **_what(cls, fmt),
            problem="stress",
            case=case.name,
            steps=min(stress.steps, case.max_steps or stress.steps),
            lr=case.lr,
            weight_decay=case.weight_decay,
            gradient_rms=case.gradient_rms,
            **found,
        )


def _what(cls: type[optim.Optimizer], fmt: StorageFormat) -> dict[str, Any]:
    return {
        "optimizer": cls.__name__,
        "format": fmt.name,
        "arguments": fmt.arguments,
        "weight_dtype": str(fmt.dtype).removeprefix("torch."),
    }


def _unless_refused(train: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, or why the optimizer does not take the format."""
    with warnings.catch_warnings():
        # Of weights without a master, which are here to show what the warning is about.
        warnings.filterwarnings("ignore", r".*accumulates in torch\.", UserWarning)
        try:
            return train(), None
        except ValueError as error:
            return None, str(error)


# The digits.

HIDDEN = 128
BATCH_SIZE = 32
TEST_SIZE = 360
DIGITS_SCALE = 2.0**12
"""Of fp16 gradients."""


class Digits(NamedTuple):
    """scikit-learn's 1797 handwritten digits, standardised; images fp64 [n, 64], labels [n]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls) -> Digits:
        """Shuffled and split. ImportError says how to get scikit-learn."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the digits need scikit-learn: pip install 'tritopt[numerics]'") from error
        digits = load_digits()
        images, labels = torch.from_numpy(digits.data), torch.from_numpy(digits.target)
        order = torch.randperm(
            len(labels), generator=torch.Generator("cpu").manual_seed(0), dtype=torch.int64, device="cpu"
        ).to(device())
        images, labels = images.to(device(), torch.float64)[order], labels.to(device())[order]
        deviation = images[TEST_SIZE:].std(dim=0)
        images = (images - images[TEST_SIZE:].mean(dim=0)) / torch.where(deviation == 0, 1.0, deviation)
        return cls(images[TEST_SIZE:], labels[TEST_SIZE:], images[:TEST_SIZE], labels[:TEST_SIZE])


class TrainedDigits(NamedTuple):
    """What a format made of the digits."""

    start: torch.Tensor
    """All weights, one after another, fp64."""
    weights: torch.Tensor
    loss: float
    accuracy: float
    counted: Bytes


@one_thread()
def train_digits(
    cls: type[optim.Optimizer], fmt: StorageFormat, digits: Digits, steps: int, lr: float
) -> TrainedDigits:
    """A network of one hidden layer, trained on its stored weights; its arithmetic is fp32, or fp64 for the truth."""
    compute = torch.float64 if fmt.dtype == torch.float64 else torch.float32
    random = torch.Generator("cpu").manual_seed(0)
    params = [torch.nn.Parameter(w.to(device(), fmt.dtype)) for w in _first_weights(random)]
    opt = make_optimizer(cls, params, fmt, lr=lr)
    scale = torch.tensor(DIGITS_SCALE if fmt.dtype == torch.float16 else 1.0, dtype=torch.float32, device=device())
    if fmt.dtype == torch.float16:
        opt.grad_scale = scale  # type: ignore[attr-defined]
    images, labels, test_images, test_labels = digits
    images, test_images = images.to(compute), test_images.to(compute)

    def logits(of: torch.Tensor) -> torch.Tensor:
        hidden, hidden_bias, out, out_bias = (param.to(compute) for param in params)
        return functional.linear(functional.linear(of, hidden, hidden_bias.view(-1)).relu(), out, out_bias.view(-1))

    start = _weights_of(opt)
    batches: Sequence[torch.Tensor] = ()
    for step in range(steps):
        at = step % (len(images) // BATCH_SIZE)
        if at == 0:
            order = torch.randperm(len(images), generator=random, dtype=torch.int64, device="cpu")
            batches = order.to(device()).split(BATCH_SIZE)
        opt.zero_grad()
        torch.autograd.backward(functional.cross_entropy(logits(images[batches[at]]), labels[batches[at]]) * scale)
        opt.step()
    weights = _weights_of(opt)
    with torch.no_grad():
        loss = float(functional.cross_entropy(logits(images), labels))
        accuracy = float((logits(test_images).argmax(dim=1) == test_labels).float().mean())
    return TrainedDigits(start, weights, loss, accuracy, counted_bytes(opt))


def _first_weights(random: torch.Generator) -> list[torch.Tensor]:
    """bf16 numbers, so that all formats begin in the same place. Biases are columns: GroupAdaGrad takes no vectors."""
    shapes = ((HIDDEN, 64), (HIDDEN, 1), (10, HIDDEN), (10, 1))
    bounds = (64**-0.5, 64**-0.5, HIDDEN**-0.5, HIDDEN**-0.5)
    return [
        torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=random).bfloat16()
        for shape, bound in zip(shapes, bounds, strict=True)
    ]


def digits_row(
    cls: type[optim.Optimizer], fmt: StorageFormat, digits: Digits, steps: int, lr: float, truth: TrainedDigits
) -> Row:
    """What the format made of the digits."""
    trained, refused = truth, None
    if fmt is not TRUTH:
        trained, refused = _unless_refused(lambda: train_digits(cls, fmt, digits, steps, lr))
    found: dict[str, Any] = {"refused": refused}
    if trained is not None:
        found = {
            **trained.counted._asdict(),
            **Movement.of(trained.weights, truth.weights, truth.start)._asdict(),
            "loss": trained.loss,
            "accuracy": trained.accuracy,
        }
    decay = inspect.signature(cls).parameters["weight_decay"].default
    return Row(**_what(cls, fmt), problem="digits", case=DIGITS, steps=steps, lr=lr, weight_decay=decay, **found)


# The report.


@dataclass
class Report:
    """Rows for these formats, the truth's before them."""

    cls: type[optim.Optimizer] = optim.AdamW
    formats: Sequence[StorageFormat] = field(default_factory=find_formats)
    steps: int = STEPS
    lr: float = DIGITS_LR
    """Of the digits."""
    with_digits: bool = True

    def __post_init__(self) -> None:
        if validate.finite("lr", self.lr) <= 0:
            raise ValueError(f"lr={self.lr!r} must be positive")
        if self.with_digits and find_spec("sklearn") is None:
            raise ImportError(
                "the digits need scikit-learn: pip install 'tritopt[numerics]', or leave them out with --no-digits"
            )

    def __len__(self) -> int:
        return (1 + len(self.formats)) * (len(self.cases) + self.with_digits)

    @property
    def cases(self) -> list[Case]:
        """Of the stress: all that the optimizer takes."""
        return [case for case in CASES if self.cls.rule.decays or not case.weight_decay]

    def rows(self) -> Iterator[Row]:
        """As soon as they are known."""
        stress = Stress(self.cases, self.steps)
        truth = train_stress(self.cls, TRUTH, stress)
        if self.with_digits:
            digits = Digits.load()
            of_digits = train_digits(self.cls, TRUTH, digits, self.steps, self.lr)
        for fmt in (TRUTH, *self.formats):
            if self.with_digits:
                yield digits_row(self.cls, fmt, digits, self.steps, self.lr, of_digits)
            yield from stress_rows(self.cls, fmt, stress, truth)


# The table.


class Column(NamedTuple):
    """Of the table: one number per format."""

    title: str
    number: str
    """A field of `Row`."""
    cases: tuple[str, ...]
    """The worst of them is shown."""


COLUMNS = (
    Column("bytes kept", "resident", tuple(GRADIENTS)),
    Column("bytes moved", "moved", tuple(GRADIENTS)),
    Column("digits: loss", "loss", (DIGITS,)),
    Column("digits: drift %", "drift", (DIGITS,)),
    *(Column(f"kept %, lr {rate}", "kept", (f"lr {rate}",)) for rate in ("1e-2", "1e-4", "1e-6")),
    Column("update %, any g", "update", tuple(GRADIENTS)),
    Column("drift %, any g", "drift", tuple(GRADIENTS)),
    Column("kept %, outliers", "kept", (SAME_OUTLIERS, ANY_OUTLIERS)),
    Column("decay to", "remains", (DECAY,)),
)
EXPLANATION = (
    "bytes: per parameter, the gradient included. kept: share of the truth's movement. update: rms of single updates, "
    "as a share of the truth's. drift: distance from the truth, as a share of its movement. g: rms of the gradients. "
    "lr: learning rate, about an update's share of the weight. Weights are compared as the arithmetic sees them."
)


def summary(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The table: of each format, what `COLUMNS` say. A format that was refused has dashes."""
    formats = dict.fromkeys(row.format for row in rows)
    return {
        name: [_cell([row for row in rows if row.format == name], column) for column in COLUMNS] for name in formats
    }


def _cell(rows: Sequence[Row], column: Column) -> str:
    known = [getattr(row, column.number) for row in rows if row.case in column.cases]
    known = [value for value in known if value is not None]
    if not known:
        return "-"
    # Not a number is the worst of all, and no maximum would find it.
    value = max(known, key=lambda v: math.inf if math.isnan(v) else abs(v - (column.number in ("kept", "update"))))
    if column.number in ("resident", "moved"):
        return f"{value:.4g}"
    if column.number in ("loss", "remains"):
        return f"{value:.3f}"
    if column.number == "drift":
        return "0" if value == 0 else "<0.01" if value < 1e-4 else f"{100 * value:.{2 if value < 0.1 else 0}f}"
    return f"{100 * value:.1f}"
