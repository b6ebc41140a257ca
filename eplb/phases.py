"""Which steps are prefill and which are decode, as vLLM's model runner knows it."""

from __future__ import annotations

from typing import Any

from ..ipc.flags import FLAG_DECODE, FLAG_PREFILL
from .hooks import call_before


def show_batches(runner_class: type) -> None:
    """Let `runner_class` hand its batch to its EPLB state (`state.batch`) before each step.

    A runner without `eplb_step` is left as it is: the phase of its steps is unknown then.
    """

    def show(runner: Any) -> None:
        if runner.eplb_state is not None:  # else a model without EPLB, in the same process
            runner.eplb_state.batch = getattr(runner, "input_batch", None)

    call_before(runner_class, "eplb_step", show)


def phase_of(batch: Any) -> int:
    """`FLAG_PREFILL`, `FLAG_DECODE` or both for the forward pass of `batch`; 0 if it is unknown.

    Args:
        batch: vLLM's `InputBatch` between a forward pass and the next one, of its first `num_reqs`
            requests: `is_prefilling_np` of model runner V2, `num_prompt_tokens` and
            `num_computed_tokens_cpu` (before the pass) of V1.
    """
    try:
        requests = int(batch.num_reqs)
        if hasattr(batch, "is_prefilling_np"):
            prefill = batch.is_prefilling_np[:requests]
        else:
            prefill = batch.num_computed_tokens_cpu[:requests] < batch.num_prompt_tokens[:requests]
    except AttributeError:
        return 0
    return FLAG_PREFILL * bool(prefill.any()) | FLAG_DECODE * (not prefill.all())
