import re

import numpy as np
import pytest
from numba import int16, int32, int64, njit

from flash_eplb.ipc import ballot_box, heat_ring, status
from flash_eplb.ipc.atomics import WORD, load_acquire, store_release

WORDS = int64[::1]
CELLS = int16[:, :, ::1]
LOAD = r"load atomic i64, .* acquire, align 8"
STORE = r"store atomic i64 .* release, align 8"
COPY = r"call void @llvm.memcpy"


def compiled(kernel, *signature):
    """The lines of optimized LLVM code of `kernel`, from a compilation without the cache."""
    function = njit(kernel.py_func)
    function.compile(signature)
    (text,) = function.inspect_llvm().values()
    start = text.index("\ndefine ")
    return text[start : text.index("\n}", start)].splitlines()


def found(lines, pattern):
    return [number for number, line in enumerate(lines) if re.search(pattern, line)]


@pytest.mark.parametrize("value", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_a_word_comes_back(value):
    words = np.arange(5).astype(WORD)
    store_release(words, 3, value)
    assert words.tolist() == [0, 1, 2, value, 4]
    assert load_acquire(words, 3) == value


def test_every_word_is_reached():
    words = np.arange(1000, 1100).astype(WORD)
    assert [load_acquire(words, index) for index in range(100)] == words.tolist()
    for index in range(100):
        store_release(words, index, -index)
    assert words.tolist() == [-index for index in range(100)]


def test_a_view_of_bytes_is_written_through():
    body = np.zeros(64, np.uint8)
    store_release(body[8:16].view(WORD), 0, 0x0102030405060708)
    assert body[8:16].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert body.sum() == 36


def test_a_load_is_one_atomic_acquire():
    assert len(found(compiled(load_acquire, WORDS, int64), LOAD)) == 1


def test_a_store_is_one_atomic_release():
    assert len(found(compiled(store_release, WORDS, int64, int64), STORE)) == 1


def test_a_vote_is_settled_by_one_swap():
    lines = compiled(ballot_box._settle, WORDS, int64, int64, int64)
    assert len(found(lines, r"cmpxchg ptr .* acq_rel acquire, align 8")) == 1
    assert not found(lines, LOAD + "|" + STORE)


def test_a_record_is_written_between_its_odd_and_its_even_sequence_and_then_shown():
    lines = compiled(heat_ring._push, WORDS, *[int64] * 8, int32[:, ::1])
    odd, even, head = found(lines, STORE)
    (fence,) = found(lines, "fence release")
    fields = found(lines, r"store i64 %arg")
    (copy,) = found(lines, COPY)
    assert odd < fence < min(fields)
    assert len(fields) == 6
    assert max(fields) < copy < even < head
    assert "%arg.words.4" not in lines[even].split("ptr")[1]
    assert "%arg.words.4" in lines[head].split("ptr")[1]


def test_a_reader_acquires_and_fences_between_its_copy_and_its_second_look():
    lines = compiled(heat_ring._read, WORDS, int64, int64, int64, int64[:, ::1], int32[:, :, ::1])
    assert len(found(lines, LOAD)) >= 3
    (copy,) = found(lines, COPY)
    (fence,) = found(lines, "fence acquire")
    again = min(line for line in found(lines, LOAD) if line > fence)
    assert copy < fence
    assert not found(lines[fence + 1 : again], r"load|store|call|br |^\S+:")


def test_the_board_is_written_between_two_releases():
    lines = compiled(status._write_board, WORDS, int64, CELLS)
    odd, even = found(lines, STORE)
    (fence,) = found(lines, "fence release")
    (copy,) = found(lines, COPY)
    (epoch,) = found(lines, "store i64 %arg.epoch")
    assert odd < fence < min(copy, epoch)
    assert max(copy, epoch) < even


def test_the_board_is_read_between_two_acquires():
    lines = compiled(status._read_board, WORDS, CELLS)
    before, after = found(lines, LOAD)
    (copy,) = found(lines, COPY)
    (fence,) = found(lines, "fence acquire")
    assert before < copy < fence < after
