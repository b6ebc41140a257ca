"""An expert-parallel load balancer that runs beside vLLM."""

# vLLM imports this package in every process, and pytest imports this file as a module without a
# package where the checkout's name is no identifier: nothing heavy here, nothing relative.

from typing import Any

__version__ = "0.1.0"

_PUBLIC = {"FlashLB": "flash_eplb.planners.flashlb", "Plan": "flash_eplb.planners.plan"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
