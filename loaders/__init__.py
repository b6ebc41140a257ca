"""Loaders: plans from the queue into weights and maps, agreed by all ranks."""

from ..kernel_cache import provide

provide()
