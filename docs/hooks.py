"""MkDocs hooks: what pages show of the code and of saved benchmarks is generated when the site is built.

A page asks for a table with a comment, `<!-- generated: NAME -->`. Each optimizer gets a page of its own, and the site
gets llms.txt (an index of the pages) and llms-full.txt (their text) for programs that read documentation.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tritopt.commands.list import documented  # noqa: E402 (the checkout's, installed or not)
from tritopt.kernels.formats.weights import MASTERS  # noqa: E402
from tritopt.mxnet import registry  # noqa: E402
from tritopt.tools import cost, docs, support  # noqa: E402
from tritopt.tools.numerics import load  # noqa: E402
from tritopt.tools.numerics.report import COLUMNS, summary  # noqa: E402
from tritopt.tools.optimizers import torch_classes  # noqa: E402
from tritopt.tools.storage import find_formats  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
GENERATED = re.compile(r"<!-- generated: (.*?) -->")
MODELS = {"1B": 1e9, "7B": 7e9, "13B": 13e9, "70B": 70e9}
"""Number of parameters, by name."""
MEASURES = ("contestant", "replaced", "ms", "best_ms", "cold_ms", "ratio", "refused")
"""Fields of a row of host times that do not say what was measured."""

Rows = Sequence[Sequence[str]]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Write a table in Markdown. right: titles of columns that are numbers."""
    rules = ["---:" if title in right else "---" for title in header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rules, *rows])


def stem(name: str) -> str:
    """Name of an optimizer's page, from how `tritopt list` writes it."""
    return name.partition("(")[0].lower()


def optimizers() -> str:
    """Launches, states and bytes of every optimizer: `tritopt list`."""
    header, _, *rows = documented(list(cost.listings()))
    wanted = [i for i, title in enumerate(header) if not title.startswith(("source", "differs"))]
    numbers = [header[i].removeprefix("bytes, ") for i in wanted if header[i].startswith("bytes")]
    titles = [header[i].removeprefix("bytes, ") for i in wanted]
    linked = [[f"[{row[0]}]({stem(row[0])}.md)", *(row[i] for i in wanted[1:])] for row in rows]
    return table(titles, linked, numbers)


def sources() -> str:
    """Source of each optimizer's formula."""
    rows = [[f"[{name}]({name}.md)", docs.source(registry.find(name)) or "-"] for name in registry.names()]
    return table(["optimizer", "source of the formula"], rows)


def differences() -> str:
    """Departures of single optimizers from MXNet's."""
    texts = {name: docs.differences(registry.find(name)) for name in registry.names()}
    rows = [[f"[{name}](../optimizers/{name}.md)", text] for name, text in texts.items() if text]
    return table(["optimizer", "differs from MXNet's in"], rows)


def memory() -> str:
    """Bytes that AdamW keeps and moves in each format, and what that is for models of some sizes."""
    rows = []
    for storage in find_formats(["fp32", "master", "split16", "split8", "split16+bf16", "split8+int8"]):
        opt = registry.find("adamw")(**storage.rule_arguments)
        kept = cost.resident_bytes(opt, storage.dtype, storage.weight_format) + storage.dtype.itemsize
        moved = cost.bytes_per_parameter(opt, storage.dtype, storage.dtype, storage.weight_format).total
        arguments = ", ".join(f"{key}={value!r}".replace("'", '"') for key, value in storage.arguments.items())
        written = f"`{arguments}`" if arguments else "fp32 weights"
        rows.append([written, f"{kept:.3g}", f"{moved:.3g}", *(f"{kept * n / 1e9:,.0f} GB" for n in MODELS.values())])
    header = ["format", "bytes kept", "bytes moved", *MODELS]
    return table(header, rows, header[1:])


def numerics() -> str:
    """Costs and losses of the formats, from saved results."""
    rows = [[f"`{name}`", *cells] for name, cells in summary(load(RESULTS / "numerics_adamw.json")).items()]
    header = ["format", *(column.title for column in COLUMNS)]
    return table(header, rows, header[1:])


def host() -> str:
    """Host times, from saved results: a row for each thing measured, columns by contestant."""
    saved = json.loads((RESULTS / "host_cpu.json").read_text())
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in saved["rows"]:
        by_case.setdefault(case_of(row), {})[row["contestant"]] = row
    contestants = list(dict.fromkeys(row["contestant"] for row in saved["rows"]))
    cold = [name for name in contestants if any(case.get(name, {}).get("cold_ms") for case in by_case.values())][:2]
    header = ["a step, ms", *contestants, *(f"{name}, cold" for name in cold)]
    rows = [
        [
            case,
            *(milliseconds(times.get(name, {}).get("ms")) for name in contestants),
            *(milliseconds(times.get(name, {}).get("cold_ms")) for name in cold),
        ]
        for case, times in by_case.items()
    ]
    machine = saved["machine"]
    where = f"Medians on two cores of an {machine['cpu']} with torch {machine['torch']}, {machine['date'][:10]}"
    note = (
        f"{where} (`benchmarks/results/host_cpu.json`). Kernels are replaced by nothing, torch's too; the reference on "
        "the CPU computes."
    )
    return f"{table(header, rows, header[1:])}\n\n{note}"


def case_of(row: dict[str, Any]) -> str:
    """Say what a row of host times measured: its title, or what earlier runs saved in its place."""
    if "title" in row:
        return str(row["title"])
    known = {"tensors", "groups", "clip", "sets"}
    tensors, groups, sets = row["tensors"], row.get("groups", 1), row.get("sets", 1)
    words = [f"{tensors:,} tensors" if groups == 1 else f"{groups:,} groups of {tensors // groups} tensor"]
    words += ["clipped"] if row.get("clip") else []
    words += [f"gradients of {sets} sets in turn"] if sets > 1 else []
    words += [str(value) for name, value in row.items() if name not in known | set(MEASURES) and value]
    return ", ".join(words)


def milliseconds(value: float | None) -> str:
    """Format a time in milliseconds."""
    return "-" if value is None else f"{value:.2f}"


def support_table(face: str) -> str:
    """Table of what each optimizer takes in a face: `tritopt list --support`."""
    cells = [record.cells() for record in support.supported() if record.face == face]
    for row in cells:
        row["optimizer"] = f"[{row['optimizer']}](optimizers/{row['optimizer'].lower()}.md)"
        if face == support.MXNET:  # the same for all
            for column in ("sharded", "capturable", "differentiable"):
                del row[column]
    return table(list(cells[0]), [list(row.values()) for row in cells])


def legend() -> str:
    """Meanings of the words in the table of support."""
    rows = [[column, word, text] for column, words in support.LEGEND.items() for word, text in words.items()]
    rows[0][2] += f" ({', '.join(f'`{master!r}`'.replace(chr(39), chr(34)) for master in MASTERS)})"
    return table(["column", "word", "meaning"], rows)


def quickstart() -> str:
    """The example that trains, saves and resumes."""
    path = ROOT / "examples" / "quickstart.py"
    if not path.exists():
        return ""
    return (
        "## Train, save and resume\n\n"
        "`examples/quickstart.py` trains a small network on scikit-learn's handwritten digits, in seconds on a CPU, "
        f"and resumes from its checkpoint:\n\n```python\n{path.read_text()}```"
    )


PARTS: dict[str, Callable[[], str]] = {
    "optimizers": optimizers,
    "sources": sources,
    "differences": differences,
    "memory": memory,
    "numerics": numerics,
    "host": host,
    "quickstart": quickstart,
    "support torch": lambda: support_table(support.TORCH),
    "support mxnet": lambda: support_table(support.MXNET),
    "support legend": legend,
    "step": lambda: f"<figure>{(ROOT / 'docs' / 'images' / 'step.svg').read_text()}</figure>",
}
"""Functions that make the parts which pages may ask for, by name."""


DOCSTRING = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false"
"""Options of mkdocstrings for a docstring under a heading of the page's own."""


def call(name: str, cls: type, first: str = "") -> str:
    """Write how a class is constructed, without annotations, as a block of code."""
    given = list(inspect.signature(cls).parameters.values())
    plain = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in given])
    arguments = str(plain)[1:-1]
    text = f"{name}({first}{arguments})"
    if len(text) > 80:
        split = [str(parameter) for parameter in plain.parameters.values()]
        kinds = [parameter.kind for parameter in plain.parameters.values()]
        if inspect.Parameter.KEYWORD_ONLY in kinds:
            split.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
        text = f"{name}(\n" + "".join(f"    {line},\n" for line in [*filter(None, [first.rstrip(", ")]), *split]) + ")"
    return f"```python\n{text}\n```"


def page_of(name: str) -> tuple[str, str]:
    """Title and text of an optimizer's page: both faces, with their recurrences."""
    cls = registry.find(name)
    face = {known.lower(): of_torch for known, of_torch in torch_classes().items()}.get(name)
    title = face.__name__ if face else cls.__name__
    parts = [f"# {title}"]
    if face is not None:
        parts += [f"## tritopt.optim.{title}", call(f"tritopt.optim.{title}", face)]
        parts += [
            f"::: {face.__module__}.{title}\n{DOCSTRING}",
            "All classes take these [options](../start.md#options).",
        ]
    parts += [f'## tritopt.create("{name}")', call("tritopt.create", cls, f'"{name}", ')]
    parts += [f"::: {cls.rule.__module__}.{cls.rule.__name__}\n{DOCSTRING}"]
    parts += ["All optimizers take the keywords of [`tritopt.Optimizer`](../mxnet.md#tritopt.Optimizer)."]
    return title, "\n\n".join(parts) + "\n"


def on_config(config: MkDocsConfig) -> None:
    """Add the optimizers' pages to the navigation."""
    for section in config.nav or ():
        if "Optimizers" in section:
            section["Optimizers"] += [{page_of(name)[0]: f"optimizers/{name}.md"} for name in registry.names()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the optimizers' pages."""
    for name in registry.names():
        files.append(File.generated(config, f"optimizers/{name}.md", content=page_of(name)[1]))


written: list[tuple[str, str, str]] = []
"""Title, address and text of the pages of this build."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put generated parts in their places."""
    for name in GENERATED.findall(markdown):
        if name not in PARTS:
            raise PluginError(f"{page.file.src_uri}: nothing generates {name!r}; known: {', '.join(PARTS)}")
    text = GENERATED.sub(lambda match: PARTS[match[1]](), markdown)
    written.append((str(page.title), page.url, re.sub(r"<figure>.*?</figure>", "", text, flags=re.DOTALL)))
    return text


def on_post_build(config: MkDocsConfig) -> None:
    """Write llms.txt and llms-full.txt."""
    site = Path(config.site_dir)
    head = f"# {config.site_name}\n\n> {config.site_description}\n\n"
    index = "".join(f"- [{title}]({config.site_url or '/'}{url})\n" for title, url, _ in written)
    (site / "llms.txt").write_text(f"{head}## Pages\n\n{index}")
    whole = "\n\n".join(
        re.sub(r"^::: (\S+)(\n(    .*)?)*", described, text, flags=re.MULTILINE) for *_, text in written
    )
    (site / "llms-full.txt").write_text(head + whole)
    written.clear()


def described(match: re.Match[str]) -> str:
    """Give the signature and docstring that mkdocstrings puts in this place."""
    module, _, name = match[1].rpartition(".")
    value = getattr(importlib.import_module(module), name)
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):  # a module, or a dict of options
        signature = ""
    return f"{match[1]}{signature}\n\n{inspect.getdoc(value)}\n"
