"""Model runner V2, whose kernels are Triton's, on the CPU by Triton's interpreter; not by itself.

`make test-runner-v2` gets Triton (700 MB unpacked) and runs it, in about ten minutes.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import SETTINGS, assert_nothing_left

from flash_eplb.eplb.demo.traffic import differences
from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_DUMMY, FLAG_PREFILL

TRITON = Path(__file__).parents[2] / "build" / "triton"
BATCHES = 3  # of eight: an interpreter takes its time


@pytest.fixture(scope="session")
def work():
    from flash_eplb.eplb.demo.checkpoint import TinyMoE
    from flash_eplb.eplb.demo.traffic import batches

    return batches(TinyMoE(), per_topic=2)[:BATCHES]


@pytest.fixture
def path(monkeypatch):
    """PYTHONPATH of an engine on model runner V2."""
    assert (TRITON / "triton").is_dir(), "make test-runner-v2 puts Triton there"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return f"{TRITON}:{Path(__file__).parent / 'triton_cpu'}"


def test_tokens_are_the_same_across_commits_dummy_steps_and_a_reload(
    generate, reloaded_reference, session, path
):
    ours = generate(
        "runner-v2",
        least_commits=3,
        reload=1,
        path=path,
        session=session,
        spawn_planner=1,
        **SETTINGS,
    )
    assert "Using V2 Model Runner" in ours.log
    assert "flash_eplb balances session" in ours.log
    assert "balancing stopped" not in ours.log
    passes, commits = ours.reloaded
    assert commits >= 3, ours.log[-5000:]
    assert ours.commits >= commits + 3, ours.log[-5000:]
    for number, answers in enumerate(ours.passes):
        differing, compared = differences(reloaded_reference[number >= passes], answers)
        assert compared == BATCHES * 8 * 40
        assert differing == 0
    assert {FLAG_DUMMY, FLAG_PREFILL, FLAG_DECODE} <= set(ours.flags)
    assert_nothing_left(session)
