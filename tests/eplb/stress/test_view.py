import io

import numpy as np
import pytest
from rich.console import Console

from flash_eplb.eplb.stress.measure import Sample
from flash_eplb.eplb.stress.setup import Setup
from flash_eplb.eplb.stress.stress import Outcome
from flash_eplb.eplb.stress.view import LiveView

SETUP = Setup("/x", "s", 58, 256, 64, 5, "drift", 0, 64, 2, 100.0, False, 2)
SAMPLE = Sample(49.0, 1234.0, np.full(58, 1.3), np.full(58, 1.9), 3, 12345)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_figure_is_cut_however_narrow_the_terminal_is(width):
    shown = io.StringIO()
    console = Console(file=shown, width=width, force_terminal=True, color_system=None)
    with LiveView(console, SETUP) as view:
        outcome = Outcome(samples=[(SAMPLE, True)], commits=123, moves=123456)
        view.show(outcome, "planner-killed")
    words = shown.getvalue()
    assert "…" not in words
    for figure in ("steps/s", "1.900", "12345 steps", "123456", "planner-killed", "refused"):
        assert figure in words
