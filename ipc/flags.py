"""The flags of a heat record; imports nothing heavy."""

from __future__ import annotations

FLAG_DUMMY = 1
"""The step was a dummy: it kept the ranks together and its heat is zero."""

FLAG_PREFILL = 2
"""Some of the step's tokens belong to prompts."""

FLAG_DECODE = 4
"""Some of the step's tokens were generated one after the other."""
