"""Print which class vLLM's `EplbState` makes, per configuration; a script of its own process.

Usage: hooks.py CHECKPOINT
"""

import json
import sys

import torch
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.engine.arg_utils import EngineArgs

BASE = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True}
MODES = {
    "tp2": {},
    "pp2": {"pipeline_parallel_size": 2},
    "tp2 dp2": {"data_parallel_size": 2},
    "plain": {"enable_eplb": False},
    "logs": {"eplb_config": {"log_balancedness": True}},
}


def main() -> None:
    made = {}
    for name, changes in MODES.items():
        arguments = EngineArgs(model=sys.argv[1], dtype="float32", **{**BASE, **changes})
        config = arguments.create_engine_config().parallel_config
        made[name] = type(EplbState(config, torch.device("cpu"))).__name__
    print("MADE", json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
