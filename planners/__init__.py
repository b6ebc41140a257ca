"""From heat to plans: the PAR objective, placements, and the rounds that carry them out."""

from ..kernel_cache import provide

provide()
