"""The demo: a tiny MoE checkpoint, a real vLLM, and the comparison with a run without us."""
