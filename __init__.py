"""flash_eplb: an expert-parallel load balancer that runs beside vLLM."""

# No imports here: vLLM loads this in every process, and pytest, in a checkout whose name is no
# package name, loads it without a package around it.
__version__ = "0.1.0"
