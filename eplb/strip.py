"""Values as a strip of coloured blocks on a terminal."""

from __future__ import annotations

import numpy as np
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"


def strip(values: np.ndarray, full: float = 1.0) -> Text:
    """One coloured block per value of excess: green and low at 0, red and full at `full`."""
    text = Text()
    for value in np.clip(np.asarray(values) / full, 0, 1):
        level = round(value * (len(_BLOCKS) - 1))
        red, green = int(min(1, 2 * value) * 220), int(min(1, 2 - 2 * value) * 190)
        text.append(_BLOCKS[level], style=f"rgb({red},{green},60)")
    return text
