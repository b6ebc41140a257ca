"""Logging: one line a message, on standard error, in every process of ours."""

from __future__ import annotations

import logging


def configure(level: str) -> None:
    """Send the log of `flash_eplb` to standard error at `level`; safe to call twice."""
    root = logging.getLogger("flash_eplb")
    root.setLevel(level)
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(process)d] %(message)s")
        )
        root.addHandler(handler)
