"""The plan of a run, the most important first: one that ends early has spent its time well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tritopt.tools.bench import peers
from tritopt.tools.bench.peers import Peer
from tritopt.tools.bench.shapes import find_models
from tritopt.tools.optimizers import find_optimizer, torch_classes
from tritopt.tools.storage import find_formats

ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "DCASGD": {"momentum": 0.9},
}
"""Arguments that an optimizer is used with, where these are not its defaults; beside the learning rate."""
MOST_WANTED = (
    "SGD", "Adam", "Lion", "LAMB", "LANS", "LARS", "Adafactor", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax",
    "Adadelta", "AdaBelief", "Adan", "NAG", "Signum", "Ftrl", "FTML",
)  # fmt: skip
"""Optimizers in the order in which they are measured; those that are not here follow."""


def _by_sums(sums: bool) -> tuple[str, ...]:
    """Name the optimizers some of whose phases sum over the elements of a tensor, or of its rows; or those without."""
    ranks = {name: rank for rank, name in enumerate(MOST_WANTED)}
    classes = torch_classes()
    in_order = sorted(classes, key=lambda name: ranks.get(name, len(ranks)))
    return tuple(n for n in in_order if any(phase.sums_elements for phase in classes[n].rule().phases) == sums)


SUMMING = _by_sums(True)
"""Optimizers whose update needs sums."""
ELEMENTWISE = tuple(name for name in _by_sums(False) if name != "AdamW")
"""Optimizers whose update of an element needs nothing of the others; AdamW is measured by itself."""
MIXED = "Mixed"
"""Name of Muon for matrices between layers and AdamW for the rest."""
MAIN = "split16"
"""Storage format of bf16 weights in tritopt.optim by default."""
FORMATS = ("master", "split16+bf16", "split8+int8", "split8+fp8")
"""Other storage formats of the plan."""
AT_ONCE = ("torch fused", "FlashOptim")
"""Peers that a target names. They stand beside ours at once, as those with a launch per tensor do on tiny tensors; what
others take is measured when everything of ours is."""


class Item(NamedTuple):
    """One number: ours, or a peer's beside it."""

    model: str
    """A key of MODELS."""
    optimizer: str
    """A class of tritopt.optim, or MIXED."""
    format: str
    """A key of tritopt.tools.storage.FORMATS."""
    peer: Peer | None = None
    """Peer that is measured; None: ours is."""

    @property
    def case(self) -> tuple[str, str, str]:
        """Model, optimizer and format, within which contestants are compared."""
        return self.model, self.optimizer, self.format

    @property
    def contestant(self) -> str:
        """Name of who is measured."""
        return self.peer.name if self.peer else "tritopt"


def plan(
    models: Sequence[str] | None = None,
    optimizers: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    chosen_peers: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Item]:
    """List all that is to be measured, in order.

    What is chosen (None: all) is crossed with what else is chosen: `formats` alone is AdamW in these, `optimizers`
    alone in MAIN, `models` alone is AdamW on these. Nothing chosen is the list that README's targets need.

    Raises:
        ValueError: an unknown name.
    """
    classes = None if optimizers is None else [_class_name(name) for name in optimizers]
    stored = None if formats is None else [fmt.name for fmt in find_formats(formats)]
    names, rivals = find_models(models), peers.find_peers(chosen_peers)
    if optimizers or formats or models:
        cases: Iterable[tuple[str, str, str]] = (
            (model, cls, fmt)
            for model in (names if models else _default_models(quick))
            for cls in classes or ["AdamW"]
            for fmt in stored or [MAIN]
        )
        ours = dict.fromkeys(cases)
        return list(_with_peers(ours, rivals, rivals))
    ours = dict.fromkeys(_important(quick))
    return list(_with_peers(ours, rivals, AT_ONCE))


def _class_name(name: str) -> str:
    return MIXED if name.lower() == MIXED.lower() else find_optimizer(name).__name__


def _default_models(quick: bool) -> tuple[str, ...]:
    return ("resnet50",) if quick else ("gpt2-xl", "resnet50")


def _important(quick: bool) -> Iterator[tuple[str, str, str]]:
    large = "resnet50" if quick else "gpt2-xl"
    yield large, "AdamW", MAIN
    yield "resnet50", "AdamW", MAIN
    if not quick:
        yield "llama3-8b", "AdamW", MAIN
    yield from ((large, cls, MAIN) for cls in ("SGD", "Adam", "Lion")[: 1 if quick else None])
    yield from ((large, cls, MAIN) for cls in SUMMING[: 1 if quick else None])
    yield from ((large, "AdamW", fmt) for fmt in FORMATS)
    yield large, MIXED, MAIN
    yield "tiny", "AdamW", MAIN
    if quick:
        return
    yield "tiny", "AdamW", "split8+int8"
    yield "huge", "AdamW", MAIN
    yield from ((large, cls, MAIN) for cls in ELEMENTWISE)
    yield large, "AdamW", "fp32"
    yield large, "AdamW", "none"
    yield large, "AdamW", "split16+int8"
    yield large, "Lion", "split8+int8"
    yield "bert-large", "AdamW", MAIN
    yield "bert-large", "LAMB", MAIN
    yield "llama3-8b", "AdamW", "split8+int8"
    yield "llama3-8b", MIXED, MAIN
    yield "llama3-8b", MIXED, "split8+int8"


def _with_peers(cases: Iterable[tuple[str, str, str]], rivals: Sequence[str], at_once: Sequence[str]) -> Iterator[Item]:
    later = []
    for model, optimizer, fmt in cases:
        yield Item(model, optimizer, fmt)
        for peer in peers.beside(optimizer, fmt, rivals):
            item = Item(model, optimizer, fmt, peer)
            if peer.name in at_once or (model == "tiny" and peer.per_tensor):
                yield item
            else:
                later.append(item)
    # Whoever counts elements in 32 bits may take the process along.
    yield from sorted(later, key=lambda item: (item.model == "huge", item.peer is not None and item.peer.slow_start))
