"""All ranks of a group are ours, or none is: upstream's collectives and ours do not go together."""

import logging
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from flash_eplb.eplb import balanced

RANK = """
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from vllm.distributed import parallel_state
from vllm.distributed.eplb.eplb_state import EplbState

from flash_eplb.eplb import balanced, vllm_state
from flash_eplb.eplb.config import Config

rank, is_ours, where = int(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
dist.init_process_group("gloo", f"file://{where}", rank=rank, world_size=2)
group = SimpleNamespace(rank_in_group=rank, world_size=2, cpu_group=dist.group.WORLD)
parallel_state._EP = group
balanced.PATIENCE = float(sys.argv[4])
if is_ours:
    vllm_state.install(Config())
parallel = SimpleNamespace(
    tensor_parallel_size=2,
    data_parallel_size=1,
    pipeline_parallel_size=1,
    all2all_backend="allgather_reducescatter",
)
print("MADE", type(EplbState(parallel, torch.device("cpu"))).__name__, flush=True)
dist.barrier()
"""


def made_by(tmp_path, ours):
    """(class of the state, log) of each of two ranks, of which `ours` have the hook."""
    environment = {name: value for name, value in os.environ.items() if "EPLB" not in name}
    patience = 60.0 if all(ours) else 0.5
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, (rank, is_ours, tmp_path / "store", patience))],
            env={**environment, "VLLM_LOGGING_LEVEL": "ERROR"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, is_ours in enumerate(ours)
    ]
    found = []
    try:
        for rank in ranks:
            said, log = rank.communicate(timeout=120)
            assert not rank.returncode, log[-3000:]
            line = next(line for line in said.splitlines() if line.startswith("MADE "))
            found.append((line[5:], log))
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return found


def test_where_all_ranks_are_ours_all_balance(tmp_path):
    (first, _), (second, _) = made_by(tmp_path, [True, True])
    assert first == second == "FlashEplbState"


def test_a_rank_without_us_leaves_upstream_in_charge_on_all(tmp_path):
    """It would wait for the others in upstream's collectives, and they for it in ours, for ever."""
    (first, _), (second, log) = made_by(tmp_path, [False, True])
    assert first == second == "EplbState"
    assert "EP rank 1 has waited 0.5 s for EP ranks [0] in vain" in log
    assert "give all ranks of the engine the same EPLB_ variables and VLLM_PLUGINS" in log


def test_where_there_is_no_group_of_experts_nobody_is_waited_for(monkeypatch):
    from vllm.distributed import parallel_state

    assert balanced.where_we_are_not() == ""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "_EP", None)
    assert balanced.where_we_are_not() == ""


def test_what_fails_while_we_ask_is_a_reason_and_ends_no_load(monkeypatch, caplog):
    def fail(config):
        raise UnicodeDecodeError("utf-8", b"\x7fELF\xff", 4, 5, "invalid start byte")

    monkeypatch.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    monkeypatch.setattr(balanced, "where_we_are_not", lambda: "EP ranks [1] in vain")
    assert balanced.why_not(fail, None).startswith("UnicodeDecodeError: ")
    assert "flash_eplb does not fit this vLLM" in caplog.text
    assert balanced.why_not(lambda config: "a mode", None) == "a mode"
    assert balanced.why_not(lambda config: "", None) == "EP ranks [1] in vain"


@pytest.mark.parametrize("owner", ["eplb_state", "eplb_updator"])
def test_an_engine_that_ends_in_a_process_that_goes_on_is_let_go(monkeypatch, owner):
    class State:
        worker, inert, is_writing = None, "", False

    class Worker:
        closed = False

        def close(self):
            self.closed = True

        def give_up_update(self, why):
            return True

    class EngineWorker:
        def __init__(self, state):
            self.model_runner = SimpleNamespace(**{owner: state})

        def shutdown(self):
            self.model_runner = None

    monkeypatch.setattr(balanced, "_balanced", [])
    balanced.follow_worker(EngineWorker)
    state, ours = State(), Worker()
    state.worker = ours
    balanced.add(state)
    engine = EngineWorker(state)
    assert balanced.give_up_update("")
    engine.shutdown()
    assert ours.closed
    assert not balanced.give_up_update("")
    assert balanced.is_worker()  # its main process removes what the killed leave, not a rank
    kept = weakref.ref(state)
    del state
    assert kept() is None
    engine.shutdown()  # as vLLM's destructors may do again


def test_what_fails_when_we_let_go_does_not_keep_the_engine_from_its_end(monkeypatch, caplog):
    class EngineWorker:
        model_runner = SimpleNamespace(eplb_state=SimpleNamespace(worker=None))
        ended = 0

        def shutdown(self):
            self.ended += 1

    def fail():
        raise OSError("no such device")

    monkeypatch.setattr(balanced, "_balanced", [])
    balanced.follow_worker(EngineWorker)
    engine, state = EngineWorker(), EngineWorker.model_runner.eplb_state
    state.worker = SimpleNamespace(close=fail)
    engine.shutdown()
    assert engine.ended == 1
    assert state.worker is None
    assert "OSError: no such device" in caplog.text
    assert "`eplb clean` removes its names then" in caplog.text


def test_an_update_that_begins_before_there_is_a_worker_is_known_of(monkeypatch):
    class State(SimpleNamespace):
        worker, inert, is_writing = None, "", False

    monkeypatch.setattr(balanced, "_balanced", [])
    state, refused = State(), State(inert="a mode")
    balanced.add(refused)
    assert not balanced.begin_update()
    balanced.add(state)
    assert balanced.begin_update()
    assert not balanced.begin_update()  # it is open
    assert balanced.give_up_update("a call has failed")
    assert (state.is_writing, refused.is_writing) == (True, False)
    balanced.end_update(0.0)
    assert not balanced.give_up_update("a call has failed")
    assert not state.is_writing
