import numpy as np
import pytest

from flash_eplb.eplb.stress.audit import Audit, Books
from flash_eplb.ipc.heat_ring import HeatRing

LAYERS, COLUMNS, SLOTS, TOP_K = 2, 6, 8, 3


class Engine:
    """Two ranks' rings, with a reader and a writer each."""

    def __init__(self):
        size = HeatRing.size(LAYERS, COLUMNS, SLOTS)
        bodies = [np.zeros(size, np.uint8) for _ in range(2)]
        self.writers = [HeatRing(body, LAYERS, COLUMNS, SLOTS) for body in bodies]
        self.ranks = [Reader(HeatRing(body, LAYERS, COLUMNS, SLOTS)) for body in bodies]

    def push(self, step, epoch=0, ranks=(0, 1), extra=0):
        counts = np.full((LAYERS, COLUMNS), step, np.int32)
        counts[1, 0] += extra
        for rank in ranks:
            self.writers[rank].push(step, 0, step * COLUMNS // TOP_K, 0, epoch, counts)


class Reader:
    def __init__(self, heat):
        self.heat = heat


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def books():
    return Books()


def test_what_was_written_is_read(engine, books):
    engine.push(1)  # before the audit: it starts at the oldest that stands
    audit = Audit(engine, TOP_K, books)
    for step in range(2, 6):
        engine.push(step)
        audit.look(1.0)
    engine.push(6)
    audit.close()
    assert books == Books(read=12)


def test_what_was_overwritten_is_counted(engine, books):
    audit = Audit(engine, TOP_K, books)
    for step in range(1, 31):
        engine.push(step)
    audit.look(1.0)
    audit.close()
    assert books == Books(read=16, lost=44)


def test_a_record_that_does_not_add_up_is_torn(engine, books):
    audit = Audit(engine, TOP_K, books)
    engine.push(1)
    engine.push(2, extra=1)
    audit.close()
    assert books == Books(read=4, torn=2)


@pytest.mark.parametrize("latest", [{"step": 3}, {"step": 4, "epoch": 1}])
def test_a_record_that_goes_back_is_torn(engine, books, latest):
    audit = Audit(engine, TOP_K, books)
    engine.push(3, epoch=2)
    engine.push(**{"epoch": 2, **latest}, ranks=[1])
    audit.close()
    assert books.torn == 1


def test_a_loss_that_is_not_counted_is_missing(engine, books):
    audit = Audit(engine, TOP_K, books)
    for step in range(1, 31):
        engine.push(step)
    audit.look(1.0)
    engine.ranks[0].heat.lost -= 3
    audit.close()
    assert books.unaccounted == 3


def test_the_books_of_two_engines_add_up(books):
    for _ in range(2):
        engine = Engine()
        audit = Audit(engine, TOP_K, books)
        for step in range(1, 11):
            engine.push(step)
        audit.close()
    assert books == Books(read=32, lost=8)


def test_a_look_ends_in_time_and_goes_on_with_the_next_rank(engine, books):
    audit = Audit(engine, TOP_K, books)
    engine.push(1)
    audit.look(-1.0)
    assert books.read == 0
    audit.look(1.0)
    assert books.read == 2
