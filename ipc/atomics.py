"""Acquire and release operations on shared memory.

The hosts are x86-64 and aarch64; on the latter plain stores may be seen out of order by another
core. Every word that another process waits for is therefore read with `load_acquire` and written
with `store_release`; the seqlocks of `heat_ring` and `status` use the two fences, and the ballot
box swaps one word. All are numba intrinsics over LLVM's atomic instructions; from Python they cost
one call into compiled code.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

WORD = np.dtype("<i8")
"""A shared word: 8 bytes, aligned, never torn on the two architectures."""


def _word_pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return cgutils.gep(builder, array.data, args[1])


@intrinsic
def _load_acquire(typingctx, words, index):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):
        pointer = _word_pointer(context, builder, signature, args)
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(words, types.intp), codegen


@intrinsic
def _store_release(typingctx, words, index, value):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):
        pointer = _word_pointer(context, builder, signature, args)
        builder.store_atomic(args[2], pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.int64), codegen


@intrinsic
def _compare_and_swap(typingctx, words, index, expected, value):  # type: ignore[no-untyped-def]
    """Store `value` in `words[index]` if `expected` stands there; returns what stood there.

    Nothing before it is written later, nothing after it is read earlier.
    """

    def codegen(context, builder, signature, args):
        pointer = _word_pointer(context, builder, signature, args)
        found = builder.cmpxchg(pointer, args[2], args[3], "acq_rel", "acquire")
        return builder.extract_value(found, 0)

    return types.int64(words, types.intp, types.int64, types.int64), codegen


def _fence(ordering: str) -> Any:
    @intrinsic
    def fence(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):
            builder.fence(ordering)
            return context.get_dummy_value()

        return types.void(), codegen

    return fence


def _copy(context: Any, builder: Any, signature: Any, args: Any, into_words: bool) -> Any:
    cells = context.make_array(signature.args[2])(context, builder, args[2])
    words = _word_pointer(context, builder, signature, args)
    size = builder.mul(cells.nitems, cells.itemsize)
    target, source = (words, cells.data) if into_words else (cells.data, words)
    cgutils.raw_memcpy(builder, target, source, size, 1)
    return context.get_dummy_value()


@intrinsic
def copy_in(typingctx, words, index, cells):  # type: ignore[no-untyped-def]
    """Copy the contiguous array `cells` to where `words[index]` begins, by one memcpy."""
    return types.void(words, types.intp, cells), functools.partial(_copy, into_words=True)


@intrinsic
def copy_out(typingctx, words, index, cells):  # type: ignore[no-untyped-def]
    """Fill the contiguous array `cells` with what begins at `words[index]`, by one memcpy."""
    return types.void(words, types.intp, cells), functools.partial(_copy, into_words=False)


def _each_count(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """For each cell of the array args[2], pointers to it and to its uint16 in the words."""
    cells = context.make_array(signature.args[2])(context, builder, args[2])
    short = ir.IntType(16)
    halves = builder.bitcast(_word_pointer(context, builder, signature, args), short.as_pointer())
    with cgutils.for_range(builder, cells.nitems) as loop:
        yield (
            cgutils.gep(builder, cells.data, loop.index),
            cgutils.gep(builder, halves, loop.index),
        )


@intrinsic
def narrow_in(typingctx, words, index, cells):  # type: ignore[no-untyped-def]
    """Copy the contiguous int32 `cells` to where `words[index]` begins, as uint16.

    Returns the bits that are set in any of them: above the lower 16 there must be none.
    """

    def codegen(context, builder, signature, args):
        seen = cgutils.alloca_once_value(builder, ir.IntType(32)(0))
        for cell, half in _each_count(context, builder, signature, args):
            count = builder.load(cell)
            builder.store(builder.or_(builder.load(seen), count), seen)
            builder.store(builder.trunc(count, ir.IntType(16)), half)
        return builder.load(seen)

    return types.int32(words, types.intp, cells), codegen


@intrinsic
def widen_out(typingctx, words, index, cells):  # type: ignore[no-untyped-def]
    """Fill the contiguous int32 `cells` with the uint16 that begin at `words[index]`."""

    def codegen(context, builder, signature, args):
        for cell, half in _each_count(context, builder, signature, args):
            builder.store(builder.zext(builder.load(half), ir.IntType(32)), cell)
        return context.get_dummy_value()

    return types.void(words, types.intp, cells), codegen


fence_acquire = _fence("acquire")
fence_release = _fence("release")


@njit(cache=True)
def load_acquire(words: np.ndarray, index: int) -> int:
    """Read `words[index]` (int64); nothing after it is read earlier."""
    return _load_acquire(words, index)


@njit(cache=True)
def store_release(words: np.ndarray, index: int, value: int) -> None:
    """Write `words[index]` (int64); nothing before it is written later."""
    _store_release(words, index, value)
