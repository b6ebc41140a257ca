"""How long FlashLB searches, by the name of the effort."""

from __future__ import annotations

from typing import Any

import numpy as np

from .search import Effort


def _effort(deviations: tuple, slacks: tuple, **rest: Any) -> Effort:
    return Effort(np.array(deviations, np.float32), np.array(slacks, np.float32), **rest)


EFFORTS = {
    "fast": _effort(
        (1.0,),
        (1, 1.3, 1.5, 1.75),
        heavy=0.4,
        starts=1,
        rows=10,
        checks=64,
        partners=6,
        sweeps=6,
        least=5e-6,
        fraction=3e-4,
        episodes=64,
        kicks=0,
    ),
    "balanced": _effort(
        (0.67,),
        (1, 1.1, 1.2, 1.3, 1.5, 1.75),
        heavy=0.4,
        starts=2,
        rows=128,
        checks=128,
        partners=14,
        sweeps=30,
        least=5e-6,
        fraction=4e-4,
        episodes=128,
        kicks=0,
    ),
    "thorough": _effort(
        (0, 0.67, 1.5, 3),
        (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2),
        heavy=0.0,
        starts=4,
        rows=128,
        checks=128,
        partners=32,
        sweeps=60,
        least=2e-6,
        fraction=0.0,
        episodes=1024,
        kicks=3,
    ),
}
"""What `effort` means."""

SMALL = 64
"""Slots up to which a layer is searched from many starts at any effort: it takes no time."""

KICK_WORK = 10_000
"""Slots times episodes that may be kicked in a small layer."""

THOROUGH_WORK = 3_300_000
"""The same where the effort is thorough: up to 64 episodes there are all kicks."""


def effort_of(name: str, slots: int, episodes: int) -> Effort:
    """The effort `name` for layers of `slots` slots, on all ranks together, over `episodes`."""
    if slots > SMALL:
        return EFFORTS[name]
    most, work = (800, THOROUGH_WORK) if name == "thorough" else (100, KICK_WORK)
    kicks = min(most, work // (slots * max(1, episodes)))
    return EFFORTS["thorough"]._replace(starts=16 if kicks else 4, kicks=kicks)
