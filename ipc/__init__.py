"""Shared memory between vLLM workers and the planner: segments, heat ring, plan queue, doorbell."""

from ..kernel_cache import provide

provide()
