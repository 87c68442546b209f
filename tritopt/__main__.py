"""The command line. It says what a check is about to do before it imports torch and Triton, which takes seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import tritopt
from tritopt.tools import resources

CASES = {False: 58, True: 33}
"""Number of cases of an optimizer, by whether checks are quick; about, since their arguments differ."""
CASES_OF_OWN = {False: 28, True: 17}
"""The same of an optimizer of one's own that declares no variants."""
N_FORMATS = 16
"""Number of storage formats that these are of."""
SECONDS = {False: 0.13, True: 0.09}
"""Time of a case in Triton's interpreter on one core, by whether checks are quick; about."""
START_SECONDS = 5
"""Time to import torch and Triton, twice: the processes that run the cases do it, too."""
GPUS = ("/dev/nvidia[0-9]*", "/dev/kfd")
"""Patterns of devices, one of which is there where NVIDIA's or AMD's driver has a GPU."""


def announcement(arguments: Sequence[str]) -> str | None:
    """Say how many cases a check of these arguments has and how long it takes, both about; None for anything else."""
    if arguments[:1] != ["check"] or {"--json", "--help"} & set(arguments):
        return None
    given: dict[str, list[str]] = {name: [] for name in ("", "--optimizer", "--format", "--target", "--jobs", "-j")}
    rest = iter(arguments[1:])
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option in given:
            given[option].append(value if equals else next(rest, ""))
        elif not argument.startswith("-"):
            given[""].append(argument)
    quick = "--quick" in arguments
    named = len(given[""]) + len(given["--optimizer"])
    n = named or len(list(Path(__file__).parent.glob("optimizers/[a-z]*.py")))
    n_own = sum(":" in name for name in (*given[""], *given["--optimizer"]))
    of_all_formats = (n - n_own) * CASES[quick] + n_own * CASES_OF_OWN[quick]
    cases = max(1, of_all_formats * (len(given["--format"]) or N_FORMATS) // N_FORMATS)
    about = f"about {int(float(f'{cases:.2g}')):,} cases"
    said = f"tritopt {tritopt.__version__} checks {n} optimizer{'s' * (n > 1)}: {about}"
    if "--compiled" in arguments or (any(map(glob, GPUS)) and "TRITON_INTERPRET" not in os.environ):
        return f"{said}, whose kernels are compiled first."
    jobs = [int(value) for value in (*given["--jobs"], *given["-j"]) if value.isdecimal()]
    processes = min([resources.n_processes(cases), *jobs])
    seconds = START_SECONDS + cases * SECONDS[quick] / max(1, processes)
    takes = f"{10 * round(seconds / 10) or 10} seconds" if seconds < 95 else f"{round(seconds / 60)} minutes"
    return f"{said} and {takes} with {processes} process{'es' * (processes > 1)}."


def main() -> None:
    """Run the command line."""
    if said := announcement(sys.argv[1:]):
        print(said, flush=True)
    try:
        from tritopt.commands.app import app
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="tritopt")


if __name__ == "__main__":
    main()
