"""Other libraries' optimizers, each beside the formats of ours that store about as much; and ours in another way.

Nothing is imported before it is asked for, so a library that is not installed is a row that says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch

from tritopt.engine.validate import did_you_mean

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Peer:
    """One way of another library, or another way of ours, to do what an optimizer of ours does."""

    name: str
    path: str
    """Module and class, "package.module:Class"."""
    formats: tuple[str, ...]
    """Our storage formats that it stands beside, by name."""
    moved: float | None
    """Bytes per parameter that its step must move as it stores things, gradient included, without a clip.

    None: they depend on the model.
    """
    stores: str
    """Storage of weights, then of states, in words. Gradients have the weights' dtype."""
    dtype: torch.dtype = FP32
    """Dtype of weights and gradients."""
    arguments: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "AdamW"
    """Name of ours that it is compared with, a class of tritopt.optim."""
    compiled: bool = False
    """Whether torch.compile compiles the step, as its documentation recommends."""
    slow_start: bool = False
    """Whether its first step takes minutes for hundreds of tensors: measured after all others."""
    per_tensor: bool = False
    """Whether it launches at least one kernel for each tensor."""
    least: int = 0
    """Elements of the smallest tensor that it stores so."""

    @property
    def module(self) -> str:
        """Module that has the class."""
        return self.path.partition(":")[0]

    @property
    def package(self) -> str:
        """Package that has to be installed: torch, where it is classes of torch that a module here puts together."""
        package = self.module.partition(".")[0]
        return "torch" if package == "tritopt" else package

    def missing(self) -> str | None:
        """Say why it cannot be measured here, or None. Says nothing of what importing it would raise."""
        return None if find_spec(self.package) else f"not installed: no module {self.package!r}"

    def cls(self) -> Any:
        """Import the class. Raises whatever that raises."""
        module, _, name = self.path.partition(":")
        return attrgetter(name)(importlib.import_module(module))

    def make(self, params: Sequence[torch.nn.Parameter], lr: float) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
        """Make the optimizer and its step. Raises whatever the library raises."""
        opt: torch.optim.Optimizer = self.cls()(list(params), lr=lr, **self.arguments)
        if not self.compiled:
            return opt, opt.step
        for group in opt.param_groups:
            # A rate that is a number would be compiled in, and compiled again when it changes.
            group["lr"] = torch.tensor(lr, dtype=torch.float32, device="cpu")
        return opt, torch.compile(opt.step, fullgraph=False)


def _torch(name: str, moved: float, formats: tuple[str, ...], **more: Any) -> list[Peer]:
    """List a class of torch.optim with fp32 weights, in place of bf16 ones with a master, by torch's three ways."""
    contestants = [
        ("torch foreach", {"foreach": True}, False),
        ("torch compiled", {"foreach": True, "capturable": True}, True),
    ]
    if name in ("SGD", "Adam", "AdamW", "Adagrad"):
        contestants.insert(0, ("torch fused", {"fused": True}, False))
    peers = []
    for contestant, arguments, compiled in contestants:
        if not compiled or name == "AdamW":
            keys = {**arguments, **more}
            peers.append(
                Peer(
                    contestant,
                    f"torch.optim:{name}",
                    formats,
                    moved,
                    "fp32; fp32",
                    FP32,
                    keys,
                    name,
                    compiled,
                    compiled,
                )
            )
    return peers


BESIDE_FP32 = ("fp32", "split16", "master")

PEERS: tuple[Peer, ...] = (
    *_torch("AdamW", 28, BESIDE_FP32),
    Peer("torch fused bf16", "torch.optim:AdamW", ("none",), 14, "bf16; bf16", BF16, {"fused": True}),
    Peer(
        "torch fused, bf16 states", "tritopt.tools.bench.torch_bf16_states:AdamWWithBf16States", ("split16+bf16",), 20,
        "fp32; bf16",
    ),
    *_torch("Adam", 28, BESIDE_FP32),
    *_torch("SGD", 20, BESIDE_FP32, momentum=0.9),
    *_torch("Adagrad", 20, BESIDE_FP32),
    *_torch("RMSprop", 20, BESIDE_FP32),
    *_torch("NAdam", 28, BESIDE_FP32),
    *_torch("RAdam", 28, BESIDE_FP32),
    *_torch("Adamax", 28, BESIDE_FP32),
    *_torch("Adadelta", 28, BESIDE_FP32),
    Peer("torch for-loop", "torch.optim:Muon", BESIDE_FP32, 20, "fp32; fp32", FP32, {}, "Muon", per_tensor=True),
    # What a kernel of ours makes of the iteration's symmetric products, beside torch's.
    Peer(
        "tritopt ns_symmetric", "tritopt.optim:Muon", ("split16",), 18, "bf16 + 16 bits; fp32", BF16,
        {"ns_symmetric": True}, "Muon",
    ),
    Peer(
        "torch for-loop", "tritopt.tools.bench.torch_mixed:MuonAndAdamW", BESIDE_FP32, None, "fp32; fp32", FP32, {},
        "Mixed", per_tensor=True,
    ),
    Peer("apex", "apex.optimizers:FusedAdam", BESIDE_FP32, 28, "fp32; fp32", FP32, {"adam_w_mode": True}),
    Peer("apex", "apex.optimizers:FusedSGD", BESIDE_FP32, 20, "fp32; fp32", FP32, {"momentum": 0.9}, "SGD"),
    # Four passes: the gradients' norm, the moments with the update in the gradient's place, two norms, the weights.
    Peer("apex", "apex.optimizers:FusedLAMB", BESIDE_FP32, 52, "fp32; fp32", FP32, {}, "LAMB"),
    Peer(
        "TransformerEngine", "transformer_engine.pytorch.optimizers:FusedAdam", ("fp32",), 28, "fp32; fp32", FP32,
        {"adam_w_mode": True},
    ),
    Peer(
        "TransformerEngine", "transformer_engine.pytorch.optimizers:FusedAdam", ("master",), 28, "bf16 + fp32; fp32",
        BF16, {"adam_w_mode": True, "master_weights": True},
    ),
    Peer(
        "TransformerEngine", "transformer_engine.pytorch.optimizers:FusedAdam", ("split16",), 26,
        "bf16 + 16 bits; fp32", BF16,
        {"adam_w_mode": True, "master_weights": True, "store_param_remainders": True},
    ),
    Peer(
        "TransformerEngine", "transformer_engine.pytorch.optimizers:FusedAdam", ("split16+bf16",), 18,
        "bf16 + 16 bits; bf16", BF16,
        {"adam_w_mode": True, "master_weights": True, "store_param_remainders": True, "exp_avg_dtype": BF16,
         "exp_avg_sq_dtype": BF16},
    ),
    Peer(
        "bitsandbytes", "bitsandbytes.optim:AdamW32bit", BESIDE_FP32, 28, "fp32; fp32", FP32, {}, per_tensor=True
    ),
    # One fp32 scale for 256 codes of each state.
    Peer(
        "bitsandbytes", "bitsandbytes.optim:AdamW8bit", ("split8+int8", "split8+fp8"), 10 + 16 / 256,
        "bf16; 8-bit codes", BF16, {}, per_tensor=True, least=4096,
    ),
    Peer("bitsandbytes", "bitsandbytes.optim:Lion", BESIDE_FP32, 20, "fp32; fp32", FP32, {}, "Lion", per_tensor=True),
    Peer(
        "torchao", "torchao.optim:AdamW8bit", ("split8+int8",), 10 + 16 / 256, "bf16, stochastic; 8-bit codes", BF16,
        {"bf16_stochastic_round": True}, per_tensor=True, least=4096,
    ),
    Peer(
        "torchao", "torchao.optim:AdamWFp8", ("split8+fp8",), 10 + 16 / 256, "bf16, stochastic; fp8", BF16,
        {"bf16_stochastic_round": True}, per_tensor=True, least=4096,
    ),
    Peer(
        "optimi", "optimi:AdamW", BESIDE_FP32, 28, "fp32; fp32", FP32, {"triton": True}, per_tensor=True
    ),
    Peer(
        "optimi", "optimi:AdamW", ("split16+bf16",), 18, "bf16 + Kahan bf16; bf16", BF16,
        {"triton": True, "kahan_sum": True}, per_tensor=True,
    ),
    Peer("optimi", "optimi:Lion", BESIDE_FP32, 20, "fp32; fp32", FP32, {"triton": True}, "Lion", per_tensor=True),
    Peer("optimi", "optimi:Adan", BESIDE_FP32, 44, "fp32; fp32", FP32, {"triton": True}, "Adan", per_tensor=True),
    # Scales of 16 bits for 32 codes of each state.
    Peer(
        "FlashOptim", "flashoptim:FlashAdamW", ("split8+int8",), 12 + 8 / 32, "bf16 + 8 bits; 8-bit codes", BF16,
        {"master_weight_bits": 24}, per_tensor=True,
    ),
    Peer(
        "FlashOptim", "flashoptim:FlashAdamW", ("split16+int8",), 14 + 8 / 32, "bf16 + 16 bits; 8-bit codes", BF16,
        {"master_weight_bits": 32}, per_tensor=True,
    ),
    Peer(
        "FlashOptim", "flashoptim:FlashLion", ("split8+int8",), 10 + 4 / 32, "bf16 + 8 bits; 8-bit codes", BF16,
        {"master_weight_bits": 24}, "Lion", per_tensor=True,
    ),
    Peer("HeavyBall", "heavyball:AdamW", BESIDE_FP32, 28, "fp32; fp32", slow_start=True),
)  # fmt: skip
"""Peers in the order in which they are measured. Signatures are those of the libraries' documentation."""


def names() -> list[str]:
    """Name all peers, in order."""
    return list(dict.fromkeys(peer.name for peer in PEERS))


def find_peers(chosen: Sequence[str] | None = None) -> list[str]:
    """Check names of peers, and take each once (None: all; "none": no peer); ValueError for an unknown one."""
    known = names()
    for name in chosen or ():
        if name not in known and name != "none":
            raise ValueError(f"unknown peer {name!r}{did_you_mean(name, known)} known: none, {', '.join(known)}")
    return [name for name in dict.fromkeys(chosen or known) if name != "none"]


def beside(optimizer: str, fmt: str, chosen: Sequence[str] | None = None) -> list[Peer]:
    """List the peers that stand beside an optimizer of ours in a format."""
    wanted = names() if chosen is None else chosen
    return [p for p in PEERS if p.name in wanted and p.optimizer == optimizer and fmt in p.formats]


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Return the distributions of each package that is installed; to look through all their files takes a second."""
    return metadata.packages_distributions()


def versions() -> dict[str, str | None]:
    """Tell the version of every peer's package; None where it is not installed, "unknown" where it does not say."""
    installed: dict[str, str | None] = {}
    distributions = _distributions()
    for package in dict.fromkeys(peer.package for peer in PEERS):
        installed[package] = None
        if find_spec(package):
            try:
                installed[package] = metadata.version(distributions.get(package, [package])[0])
            except metadata.PackageNotFoundError:
                installed[package] = "unknown"
    return installed
