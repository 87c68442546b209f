"""Does `tritopt check` notice a broken formula? Breaks each on purpose, in a scratch copy, and looks.

`python tests/mutations.py [NAME ...]` prints a table; the exit code is 1 if a mutation survives.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


# (optimizer whose check must notice, kernel file, text that occurs once in it, {what is wrong: the text instead})
FORMULAS: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "sgd",
        "sgd.py",
        "return w - s.lr * g, state",
        {
            "ascends": "return w + s.lr * g, state",
            "no learning rate": "return w - g, state",
            "learning rate twice": "return w - s.lr * (s.lr * g), state",
            "a decay nobody asked": "return w - s.lr * (g + 1e-4 * w), state",
        },
    ),
    (
        "sgd",
        "sgd.py",
        "s.momentum * momentum - s.lr * g",
        {
            "momentum never fades": "momentum - s.lr * g",
            "sign of the gradient": "s.momentum * momentum + s.lr * g",
            "no learning rate": "s.momentum * momentum - g",
            "dampened": "s.momentum * momentum - (1 - s.momentum) * s.lr * g",
        },
    ),
    (
        "sgd",
        "sgd.py",
        "return w + momentum, (momentum,)",
        {
            "sign of the step": "return w - momentum, (momentum,)",
            "momentum is not kept": "return w + momentum, state",
        },
    ),
    (
        "nag",
        "nag.py",
        "momentum = s.momentum * momentum - s.lr * g",
        {
            "momentum never fades": "momentum = momentum - s.lr * g",
            "sign": "momentum = s.momentum * momentum + s.lr * g",
            "no learning rate": "momentum = s.momentum * momentum - g",
        },
    ),
    (
        "nag",
        "nag.py",
        "w + (s.momentum * momentum - s.lr * g)",
        {
            "heavy ball": "w + momentum",
            "no gradient in the step": "w + s.momentum * momentum",
            "momentum not scaled": "w + (momentum - s.lr * g)",
            "sign of the gradient": "w + (s.momentum * momentum + s.lr * g)",
        },
    ),
    (
        "nag",
        "nag.py",
        "- s.lr * g), (momentum,)",
        {
            "momentum is not kept": "- s.lr * g), state",
        },
    ),
    (
        "adam",
        "adam.py",
        "return w - s.lr",
        {
            "ascends": "return w + s.lr",
        },
    ),
    (
        "adam",
        "adam.py",
        "return w - s.lr * div",
        {
            "no learning rate": "return w - div",
        },
    ),
    (
        "adam",
        "adam.py",
        "s.beta1 * mean",
        {
            "beta2 for beta1": "s.beta2 * mean",
        },
    ),
    (
        "adam",
        "adam.py",
        "s.beta2 * var",
        {
            "beta1 for beta2": "s.beta1 * var",
        },
    ),
    (
        "adam",
        "adam.py",
        "s.one_minus_beta1 * g",
        {
            "gradient not averaged": "g",
        },
    ),
    (
        "adam",
        "adam.py",
        "s.one_minus_beta2 * (g * g)",
        {
            "1 - beta2 formed in fp32": "(1 - s.beta2) * (g * g)",
        },
    ),
    (
        "adam",
        "adam.py",
        "(g * g)",
        {
            "gradient not squared": "g",
        },
    ),
    (
        "adam",
        "adam.py",
        "sqrt(var) + s.epsilon",
        {
            "epsilon inside the root": "sqrt(var + s.epsilon)",
            "no epsilon": "sqrt(var)",
            "no root": "var + s.epsilon",
        },
    ),
    (
        "adam",
        "adam.py",
        "epsilon), (mean, var)",
        {
            "moments are not kept": "epsilon), state",
            "moments change places": "epsilon), (var, mean)",
        },
    ),
    (
        "adamw",
        "adamw.py",
        "moved - s.decay * w, state",
        {
            "weights grow": "moved + s.decay * w, state",
            "no decay": "moved, state",
            "decays the moved weight": "moved - s.decay * moved, state",
            "learning rate twice": "moved - s.lr * s.decay * w, state",
        },
    ),
    (
        "adamw",
        "adamw.py",
        "adam_update(w, g, state, s)",
        {
            "coupled decay": "adam_update(w, g + s.decay * w, state, s)",
            "ascends": "adam_update(w, -g, state, s)",
        },
    ),
    (
        "adamw",
        "adam.py",
        "sqrt(var) + s.epsilon",
        {
            "epsilon inside the root": "sqrt(var + s.epsilon)",
        },
    ),
    (
        "adamw",
        "adam.py",
        "s.beta2 * var",
        {
            "beta1 for beta2": "s.beta1 * var",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "mean * s.mean_correction",
        {
            "mean not corrected": "mean",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "var * s.var_correction",
        {
            "variance not corrected": "var",
            "the mean's correction": "var * s.mean_correction",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "var * s.var_correction) + s.epsilon",
        {
            "epsilon inside the root": "var * s.var_correction + s.epsilon)",
        },
    ),
    (
        "lamb",
        "lamb.py",
        " + s.wd * w",
        {
            "no decay": "",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "s.beta1 * mean",
        {
            "beta2 for beta1": "s.beta2 * mean",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "s.beta2 * var",
        {
            "beta1 for beta2": "s.beta1 * var",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "s.one_minus_beta1 * g",
        {
            "gradient not averaged": "g",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "(w * w, direction * direction)",
        {
            "norm of the gradient": "(g * g, direction * direction)",
            "norms change places": "(direction * direction, w * w)",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "sqrt(sums[0])",
        {
            "norm not rooted": "sums[0]",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "tl.where(weight_norm < s.lower_bound, s.lower_bound, weight_norm)",
        {
            "no lower bound": "weight_norm",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "tl.where(weight_norm > s.upper_bound, s.upper_bound, weight_norm)",
        {
            "no upper bound": "weight_norm",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "(weight_norm == 0) | (direction_norm == 0)",
        {
            "divides by zero": "weight_norm == 0",
            "zero weights stay zero": "direction_norm == 0",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "s.lr * trust_ratio * _dir",
        {
            "no trust ratio": "s.lr * _dir",
        },
    ),
    (
        "lamb",
        "lamb.py",
        "return w - s.lr",
        {
            "ascends": "return w + s.lr",
        },
    ),
    (
        "test",
        "test.py",
        "w - s.lr * g",
        {
            "ascends": "w + s.lr * g",
            "no learning rate": "w - g",
            "learning rate twice": "w - s.lr * (s.lr * g)",
            "weight forgotten": "-s.lr * g",
            "gradient ignored": "w - s.lr * w",
        },
    ),
    # What all optimizers share; one of each kind looks.
    (
        "sgd",
        "preambles.py",
        "clip(rescale * g, bound) + wd * w",
        {
            "no decay": "clip(rescale * g, bound)",
            "decay is clipped": "clip(rescale * g + wd * w, bound)",
            "clips too early": "rescale * clip(g, bound) + wd * w",
            "never clips": "rescale * g + wd * w",
        },
    ),
    (
        "adamw",
        "preambles.py",
        "return clip(rescale * g, bound)\n",
        {
            "never clips": "return rescale * g\n",
            "never rescales": "return clip(g, bound)\n",
        },
    ),
    (
        "sgd",
        "ops.py",
        "return tl.where(x < -bound, -bound, x)",
        {
            "no lower clip bound": "return x",
        },
    ),
    (
        "sgd",
        "ops.py",
        "bits + 0x7FFF + ((bits >> 16) & 1)",
        {
            "bf16 cut off": "bits",
        },
    ),
    (
        "sgd",
        "formats.py",
        "tl.store(planes[1] + offsets, value, mask=mask)",
        {
            "master not stored": "pass",
        },
    ),
    (
        "sgd",
        "formats.py",
        "tl.load(planes[1] + offsets",
        {
            "weight read for its master": "tl.load(planes[0] + offsets",
        },
    ),
]


class Mutation(NamedTuple):
    """One entry of FORMULAS."""

    optimizer: str
    file: str
    old: str
    wrong: str
    new: str


MUTATIONS = [
    Mutation(optimizer, file, old, wrong, new)
    for optimizer, file, old, texts in FORMULAS
    for wrong, new in texts.items()
]


class Outcome(NamedTuple):
    """What the check said to a mutation."""

    caught: bool
    comment: str


def copy_checkout(to: Path) -> None:
    """The package alone, its symlink to the kernels included."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("tritopt", "kernels"):
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=ignored)


def mutate(checkout: Path, mutation: Mutation) -> None:
    """Replace the text; ValueError if it does not occur exactly once."""
    path = checkout / "kernels" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"kernels/{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times; it must occur once"
        )
    path.write_text(text.replace(mutation.old, mutation.new))


def run_check(optimizer: str, mutation: Mutation | None) -> Outcome:
    """`tritopt check --quick` of one optimizer in a mutated copy of the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        copy_checkout(checkout)
        if mutation is not None:
            mutate(checkout, mutation)
        run = subprocess.run(
            [sys.executable, "-m", "tritopt", "check", "--quick", "--json", "--optimizer", optimizer],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if run.returncode not in (0, 1) or not run.stdout.startswith("{"):
            raise RuntimeError(
                f"{optimizer}, {mutation}: the check itself broke, exit code {run.returncode}\n{run.stderr}"
            )
    rows = json.loads(run.stdout)["rows"]
    # A mutation that raises says nothing about the check: only a difference counts.
    noticed = [row["reason"] for row in rows if not row["passed"] and "differ by" in row["reason"]]
    return Outcome(run.returncode == 1 and bool(noticed), f"{len(noticed)} of {len(rows)} cases fail")


def main(names: list[str]) -> int:
    """Run the mutations of these optimizers, and print what became of them."""
    mutations = [mutation for mutation in MUTATIONS if mutation.optimizer in names]
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sound = dict(zip(names, pool.map(lambda name: run_check(name, None), names), strict=True))
        broken = [name for name, outcome in sound.items() if outcome.caught]
        if broken:
            console.print(f"the check of {', '.join(broken)} fails without any mutation; mend that first")
            return 1
        running = pool.map(lambda mutation: run_check(mutation.optimizer, mutation), mutations)
        progress = Console(stderr=True)
        outcomes = list(track(running, "mutations", len(mutations), console=progress, disable=not progress.is_terminal))
    table = Table("optimizer", "file", "wrong", "text", "outcome", "")
    for mutation, outcome in zip(mutations, outcomes, strict=True):
        verdict = "caught" if outcome.caught else "SURVIVED"
        table.add_row(*mutation[:2], mutation.wrong, mutation.new.strip() or "(nothing)", verdict, outcome.comment)
    console.print(table)
    survivors = sum(not outcome.caught for outcome in outcomes)
    console.print(f"{len(mutations) - survivors} of {len(mutations)} mutations caught; the unmutated checks pass")
    return 1 if survivors else 0


if __name__ == "__main__":
    known = sorted({mutation.optimizer for mutation in MUTATIONS})
    parser = argparse.ArgumentParser(description="Break formulas on purpose and see whether `tritopt check` notices.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"optimizers: {', '.join(known)}")
    chosen = parser.parse_args().names
    if unknown := set(chosen) - set(known):
        parser.error(f"no mutations of {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    sys.exit(main(chosen or known))
