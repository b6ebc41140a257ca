"""Let vLLM's CPU build take Triton's interpreter (TRITON_INTERPRET=1) for a Triton CPU backend.

On PYTHONPATH, beside Triton itself, in each process of vLLM; see runner_v2.py.
"""

import triton.backends


class _Driver:
    @staticmethod
    def is_active():
        return True


class _Backend:
    driver = _Driver
    compiler = None


triton.backends.backends.clear()
triton.backends.backends["cpu"] = _Backend
