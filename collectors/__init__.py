"""Collectors: each step's heat from the engine into the heat ring."""

from ..kernel_cache import provide

provide()
