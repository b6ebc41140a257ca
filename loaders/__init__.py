"""Loaders: plans from the queue into weights and maps, agreed by all ranks."""
