"""`LLM.generate`: the same tokens with the balancer, and others when it is broken on purpose."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import SETTINGS, assert_nothing_left

from flash_eplb.eplb.demo.traffic import differences
from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_PREFILL
from flash_eplb.planners.expert_map import encode_map
from flash_eplb.planners.plan import make_plan
from flash_eplb.planners.recording import Recording
from flash_eplb.planners.replay import linear_placement

MUTATION = """
def register():
    import os
    if os.environ.get("EPLB_ENABLED") == "1":
        import torch
        from flash_eplb.loaders.errand import Result

        def only_tables(self):
            for part, value in self.copies.pairs:
                if part.dtype != torch.uint8:  # the bytes of an expert
                    part.copy_(value)

        Result.commit = only_tables
"""


@pytest.fixture
def mutation(tmp_path):
    """A plug-in for vLLM that commits maps without weights; returns the folder for PYTHONPATH."""
    (tmp_path / "broken_commit.py").write_text(MUTATION)
    info = tmp_path / "broken_commit-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-commit\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nbroken_commit = broken_commit:register\n"
    )
    return str(tmp_path)


def test_tokens_are_the_same_with_an_expert_map_commits_and_a_reload(
    generate, reloaded_reference, session, tmp_path
):
    start = linear_placement(4, 16, 2, 10)
    wanted = np.stack([np.roll(layer, n, axis=1)[::-1] for n, layer in enumerate(start)])
    path = tmp_path / "map.json"
    path.write_text(encode_map(wanted))
    rounds = len(make_plan(start, wanted).rounds(SETTINGS["staging_rows"]))
    ours = generate(
        "balanced",
        least_commits=5 + rounds,
        reload=1,
        session=session,
        spawn_planner=1,
        routing="weighted",
        record=tmp_path / "recording",
        initial_placement=path,
        **SETTINGS,
    )
    assert ours.commits >= 5 + rounds, ours.log[-5000:]
    passes, commits = ours.reloaded
    for number, answers in enumerate(ours.passes):
        differing, compared = differences(reloaded_reference[number >= passes], answers)
        assert compared == 8 * 8 * 40
        assert differing == 0
    assert "flash_eplb balances session" in ours.log
    assert {FLAG_PREFILL, FLAG_DECODE} <= set(ours.flags)
    assert passes < len(ours.passes)
    assert ours.commits >= commits + 5, ours.log[-5000:]
    assert "experts are back where vLLM writes weights" in ours.log
    assert "weights were written or read, balancing goes on" in ours.log
    first, last = ours.checksums
    assert first == last  # whoever saves or sums up weights finds each expert where it was loaded
    assert len(first) == 2
    assert f"rounds; to EPLB_INITIAL_PLACEMENT={path}" in ours.log
    placements = Recording(tmp_path / "recording").placements()
    (mapped,) = (found for (_, epoch), found in placements.items() if epoch == rounds)
    assert (np.sort(mapped) == np.sort(wanted)).all()
    assert_nothing_left(session)


def test_maps_committed_without_weights_change_the_tokens(generate, reference, session, mutation):
    broken = generate(
        "mutation",
        least_commits=3,
        path=mutation,
        session=session,
        spawn_planner=1,
        verify=0,  # the digests would find it out after the first commit
        **SETTINGS,
    )
    assert broken.commits >= 3, broken.log[-5000:]
    assert differences(reference, broken.passes[-1])[0] > 0
    assert_nothing_left(session)


def test_replicas_that_differ_at_load_are_refused_by_name(generate, session):
    dummy = generate("dummy", session=session, engine={"load_format": "dummy"}, **SETTINGS)
    assert "has other weights than the first" in dummy.log
    assert "vLLM serves on, unbalanced" in dummy.log
    assert dummy.commits == 0
    assert len(dummy.passes[0]) == 8
    assert_nothing_left(session)
