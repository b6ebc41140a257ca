import numpy as np
import pytest

from flash_eplb.eplb.stress.figures import Figures, Layout, Order, Rank
from flash_eplb.eplb.stress.rows import TRANSFER_STEPS, Columns, RowEngine, RowStager, contents
from flash_eplb.ipc.placement import MOVE
from flash_eplb.loaders.errand import Errand
from flash_eplb.loaders.patrol import Beat

# Rank 0 holds experts 0 and 1, rank 1 experts 2 and 3; expert 2 is to come to rank 0, slot 1.
MOVES = np.array([(0, 2, 1, 0, 0, 1)], MOVE)
CONTENT = contents(1, 4)


@pytest.fixture
def figures(tmp_path):
    made = Figures(tmp_path / "figures", Layout(1, 2, 1, 4, 2), create=True)
    made.rows[:] = CONTENT[0].reshape(2, 1, 2)
    return made


def staged(figures, moves=MOVES, beat=None, steps=TRANSFER_STEPS):
    """The stager of rank 0 after so many steps."""
    stager, engine = RowStager(figures, 0, CONTENT), RowEngine(np.arange(4).reshape(1, 2, 2))
    tables = lambda: engine.tables(np.array([0]), engine.placement, None)  # noqa: E731
    stager.begin(Errand(0 if beat else 7, moves, 0, tables=tables, beat=beat))
    for _ in range(steps):
        stager.advance()
    return stager


def test_words_tell_experts_apart():
    words = contents(58, 256)
    assert len(np.unique(words)) == 58 * 256


def test_a_transfer_takes_steps_and_a_commit_writes(figures):
    assert staged(figures, steps=TRANSFER_STEPS - 1).busy
    stager = staged(figures)
    assert not stager.busy
    assert (stager.result.identity, stager.result.error) == (7, "")
    assert figures.rows[0, 0, 1] == CONTENT[0, 1]
    stager.result.commit()
    assert figures.rows[0].tolist() == [[CONTENT[0, 0], CONTENT[0, 2]]]


def test_a_sender_that_is_a_commit_behind_is_waited_for(figures):
    figures.ranks[0, Rank.EPOCH] = 1
    stager = staged(figures, steps=5)
    assert stager.busy
    figures.ranks[1, Rank.EPOCH] = 1
    stager.advance()
    assert stager.result.error == ""


def test_a_wrong_bit_is_let_in_once_and_noticed(figures):
    figures.order[Order.FLIP_RANK], figures.order[Order.FLIPS] = 1, 1
    first, second = staged(figures).result, staged(figures).result
    assert (first.error, first.damaged, first.changed) == ("a row arrived damaged", True, False)
    assert second.error == ""
    assert figures.ranks[0, Rank.FLIPPED] == 1


def test_a_wrong_bit_for_another_rank_is_not_let_in(figures):
    figures.order[Order.FLIP_RANK], figures.order[Order.FLIPS] = 2, 1
    assert staged(figures).result.error == ""


def test_a_source_that_is_another_expert_is_noticed(figures):
    figures.rows[1, 0, 0] = CONTENT[0, 3]
    result = staged(figures).result
    assert (result.error, result.damaged, result.changed) == ("a source row is another", True, True)


def test_a_look_at_a_live_row(figures):
    assert staged(figures, beat=Beat(0, 1, 1)).result.changed is False
    figures.rows[0, 0, 1] ^= 1
    assert staged(figures, beat=Beat(0, 1, 1)).result.changed is True


def test_columns_change_with_the_commit():
    columns = Columns((2, 2, 2))
    columns.commit()
    assert (columns.committed == 1).all()
    columns.promise(np.array([1]), np.full((1, 2, 2), 5, np.int16))
    assert (columns.committed == 1).all()
    columns.commit()
    assert columns.committed.tolist() == [[[1, 1], [1, 1]], [[5, 5], [5, 5]]]
    columns.promise(np.array([1]), None)
    columns.commit()
    assert (columns.committed == 1).all()
