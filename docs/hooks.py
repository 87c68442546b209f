"""MkDocs hooks: what pages show of the code and of saved benchmarks is generated when the site is built.

A page asks for a table with a comment, `<!-- generated: NAME -->`. Each optimizer gets a page of its own, and the site
gets llms.txt (an index of the pages) and llms-full.txt (their text) for programs that read documentation.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tritopt import optim, optimizers  # noqa: E402 (the checkout's, installed or not)
from tritopt.__main__ import app  # noqa: E402
from tritopt.mxnet import registry  # noqa: E402
from tritopt.optim.layout import MASTERS  # noqa: E402
from tritopt.tools import cost, docs, support  # noqa: E402
from tritopt.tools.numerics.record import FormatResult  # noqa: E402
from tritopt.tools.numerics.report import COLUMNS, summary  # noqa: E402
from tritopt.tools.optimizers import torch_classes  # noqa: E402
from tritopt.tools.storage import FORMATS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
GENERATED = re.compile(r"<!-- generated: (.*?) -->")
