"""Triton fused optimizers for mixed-precision training: MXNet 2.0's optimizer API on PyTorch tensors."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tritopt.public import *  # noqa: F403
else:
    # Torch and Triton take seconds to import, and the command line has something to say before: __main__.py.
    def _load() -> list[str]:
        from importlib import import_module

        public = vars(import_module("tritopt.public"))
        names = {name: value for name, value in public.items() if not name.startswith("_") and name != "tritopt"}
        globals().update(names)
        return sorted(names)

    def __getattr__(name: str) -> object:
        if name == "__all__":
            return _load()
        if not name.startswith("__"):
            from importlib import import_module
            from importlib.util import find_spec

            if find_spec(f"tritopt.{name}") is not None:  # alone: a module of the package may be asking for another
                return import_module(f"tritopt.{name}")
            _load()
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_load()})
