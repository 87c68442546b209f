"""Copy a small, representative part of the recorded MXNet trajectories into this directory.

    python tests/data/golden/subset.py SOURCE SGD NAG Adam

For each optimizer the cheapest cases (in bytes) are taken until every feature that occurs in its cases is there: each
combination of tag, dtype, multi_precision and use_fused_step, each value of each keyword argument (its absence is one),
each flag, schedule, and way to set multipliers. The choice depends on the source alone; this directory's data files
are replaced.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
MANIFEST_BYTES_PER_CASE = 600
Case = dict[str, Any]
Arrays = dict[str, npt.NDArray[Any]]


def features(case: Case, optional_kwargs: set[str]) -> set[str]:
    """Describe what a case exercises, as strings; `optional_kwargs` are those that some case of its optimizer has."""
    parts = {json.dumps([case[key] for key in ("tag", "dtype", "multi_precision", "use_fused_step")])}
    parts |= {f"{name}={case['kwargs'].get(name, 'absent')}" for name in optional_kwargs}
    parts |= {f"flag {flag}" for flag in case.get("flags", [])}
    for key in ("api", "mult_via", "lr_scheduler", "events", "active", "grad_rows", "param_idx2name"):
        parts.add(f"{key}={json.dumps(case.get(key), sort_keys=True)}")
    if "weight_stype" in case:
        parts.add(f"{case['weight_stype']} weight, lazy_update={case['kwargs'].get('lazy_update')}")
    return parts


def choose(cases: list[Case], cost: dict[str, int]) -> list[Case]:
    """Greedy weighted cover of all features, in the order of the source."""
    optional_kwargs = {name for case in cases for name in case["kwargs"]}
    having = {case["id"]: features(case, optional_kwargs) for case in cases}
    missing = set().union(*having.values())
    chosen: set[str] = set()
    while missing:
        best = max(having, key=lambda name: (len(having[name] & missing) / cost[name], name))
        chosen.add(best)
        missing -= having[best]
    return [case for case in cases if case["id"] in chosen]


def output_keys(case: Case) -> tuple[str, str]:
    return case["keys"]["weights"], case["keys"]["states"]


def subset_of_optimizer(source: Path, cases: list[Case]) -> tuple[list[Case], Arrays]:
    """The chosen cases of one optimizer and their recorded weights and states."""
    with np.load(source / cases[0]["file"]) as stored:
        arrays = {case["id"]: {key: stored[key] for key in output_keys(case)} for case in cases}
    cost = {
        name: MANIFEST_BYTES_PER_CASE + sum(len(zlib.compress(a.tobytes())) for a in parts.values())
        for name, parts in arrays.items()
    }
    chosen = choose(cases, cost)
    return chosen, {key: array for case in chosen for key, array in arrays[case["id"]].items()}


def reindex_state_layouts(manifest: dict[str, Any]) -> None:
    """Keep the layouts that the manifest's cases use."""
    used = sorted({case["state_layout"] for case in manifest["cases"]})
    manifest["state_layouts"] = [manifest["state_layouts"][old] for old in used]
    manifest["cases"] = [case | {"state_layout": used.index(case["state_layout"])} for case in manifest["cases"]]


def write_subset(source: Path, optimizers: list[str], target: Path = HERE) -> None:
    """Replace the data files of `target` by the subset of those in `source`."""
    manifest = json.loads((source / "manifest.json").read_text())
    by_optimizer = {name: [c for c in manifest["cases"] if c["optimizer"] == name] for name in optimizers}
    unknown = [name for name, cases in by_optimizer.items() if not cases]
    if unknown:
        known = sorted({case["optimizer"] for case in manifest["cases"]})
        raise SystemExit(f"{source} has no cases of {', '.join(unknown)}; it has: {', '.join(known)}")
    for old in target.glob("*.npz"):
        old.unlink()
    manifest["cases"] = []
    for cases in by_optimizer.values():
        chosen, arrays = subset_of_optimizer(source, cases)
        np.savez_compressed(target / chosen[0]["file"], **arrays)  # type: ignore[arg-type]
        manifest["cases"] += chosen
    reindex_state_layouts(manifest)
    input_keys = sorted({case["keys"][key] for case in manifest["cases"] for key in ("w0", "grads")})
    inputs_file = manifest["case_defaults"]["inputs_file"]
    with np.load(source / inputs_file) as stored:
        np.savez_compressed(target / inputs_file, **{key: stored[key] for key in input_keys})
    (target / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":"), sort_keys=True) + "\n")


def report(target: Path = HERE) -> None:
    manifest = json.loads((target / "manifest.json").read_text())
    for path in sorted([*target.glob("*.npz"), target / "manifest.json"]):
        count = sum(case["file"] == path.name for case in manifest["cases"])
        print(f"{path.name:20} {path.stat().st_size:8,d} bytes" + (f" {count:4d} cases" if count else ""))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="directory of the full set: manifest.json and the .npz files")
    parser.add_argument("optimizer", nargs="+", help="as in the manifest, e.g. SGD")
    arguments = parser.parse_args()
    write_subset(arguments.source, arguments.optimizer)
    report()
