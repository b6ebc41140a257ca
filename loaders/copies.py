"""What a commit copies between two steps: prepared by the stager, so that little is left to do.

On the CPU a round is hundreds of small tensors, and torch takes longer to be called for each than
to copy it. Their addresses are gathered beforehand, and one compiled loop copies them all, past the
caches: no weight is read before the cache has seen many others, and a store that need not fetch its
line first takes up to half the time less. Where torch has several threads large tensors are left to
it, which copies them with all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SMALL = 128 << 10
"""Bytes up to which a tensor is copied by one thread: more of them take longer to start."""

STREAMED = 1 << 10
"""Bytes from which on the caches are passed by: what is smaller is a table, or read with one."""

_LINE = 64  # bytes that a store writes at once


@intrinsic
def _memcpy(typingctx, target, source, size):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        to, since = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, to, since, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _stream_line(typingctx, target, source):  # type: ignore[no-untyped-def]
    """Copy _LINE bytes to `target`, a multiple of it, past the caches."""

    def codegen(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(64), _LINE // 8).as_pointer()
        to, since = (builder.inttoptr(address, line) for address in args)
        store = builder.store(builder.load(since, align=1), to, align=_LINE)
        once = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", once)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _fence(typingctx):  # type: ignore[no-untyped-def]
    """What was streamed is seen before anything that is written later."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# Compiled when it is imported, with the worker; and with the GIL kept, for a thread that takes it
# meanwhile may keep it longer than the copies last.
@njit("void(int64[:, ::1])", cache=True)
def _copy(pieces: np.ndarray) -> None:
    for i in range(len(pieces)):
        to, since, size = pieces[i, 0], pieces[i, 1], pieces[i, 2]
        begin, end = 0, 0  # of what is streamed: whole lines
        if size >= STREAMED:
            begin = -to % _LINE
            end = begin + (size - begin) // _LINE * _LINE
            _memcpy(to, since, begin)
        for offset in range(begin, end, _LINE):
            _stream_line(to + offset, since + offset)
        _memcpy(to + end, since + end, size - end)
    _fence()


class Copies:
    """Tensors to be written and what goes there, one for one; they must not overlap.

    Where somebody has given a live tensor, or rows of the engine's buffer, other memory meanwhile
    (`share_memory_`, `set_`, `data`), addresses are gathered anew.

    Args:
        live: the slots to be written, the engine's tables.
        staged: the rows that go there, the values of the tables.

    Raises:
        ValueError: they are not as many, or two of them are not of one shape.
    """

    def __init__(self, live: Sequence[torch.Tensor], staged: Sequence[torch.Tensor]):
        self.pairs = list(zip(live, staged, strict=True))
        for target, source in self.pairs:
            if target.shape != source.shape:
                raise ValueError(
                    f"{tuple(source.shape)} cannot be written over {tuple(target.shape)}"
                )
        self._gather()

    def _gather(self) -> None:
        pieces = [_pieces(target, source) for target, source in self.pairs]
        self._pieces = np.concatenate([np.empty((0, 3), np.int64), *pieces])
        self._rest = [pair for pair, p in zip(self.pairs, pieces, strict=True) if not len(p)]
        self._memory: dict[int, tuple[torch.UntypedStorage | torch.Tensor, int]] = {}
        for (target, source), piece in zip(self.pairs, pieces, strict=True):
            if not len(piece):
                continue
            self._watch(target)
            if not _is_by_itself(source):  # else it is ours, or a row that the engine lends
                self._watch(source)

    def _watch(self, tensor: torch.Tensor) -> None:
        """Keep the address of what holds the memory of `tensor`: looking at each takes time."""
        memory = tensor if _is_by_itself(tensor) else tensor.untyped_storage()
        key = id(tensor) if memory is tensor else memory._cdata
        self._memory[key] = memory, memory.data_ptr()

    def run(self) -> None:
        """Write them all; on a device the copies are issued, in one call where it has it."""
        if any(memory.data_ptr() != address for memory, address in self._memory.values()):
            self._gather()
        _copy(self._pieces)
        if self._rest:
            with torch.inference_mode():  # whatever mode they were made in, or are used in
                self._run_rest()

    def _run_rest(self) -> None:
        if self._rest[0][0].device.type == "npu":
            for target, source in self._rest:
                target.copy_(source)
        else:
            targets, sources = zip(*self._rest, strict=True)
            torch._foreach_copy_(targets, sources)


def _is_by_itself(tensor: torch.Tensor) -> bool:
    """Whether it is no part of other memory: then it may be given another storage."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _most_bytes() -> int:
    """Of a tensor that is not torch's to copy."""
    return SMALL if torch.get_num_threads() > 1 else sys.maxsize


def _pieces(target: torch.Tensor, source: torch.Tensor) -> np.ndarray:
    """int64[n, 3]: addresses to copy to and from, and bytes; none if it is torch's to copy.

    A table [experts, columns] may be a part of wider rows.
    """
    if (
        any(tensor.is_conj() or tensor.is_neg() for tensor in (target, source))
        or target.device.type != "cpu"
        or source.device.type != "cpu"
        or target.dtype != source.dtype
        or target.shape != source.shape
        or target.nbytes > _most_bytes()
    ):
        return np.empty((0, 3), np.int64)
    rows, size = 1, target.nbytes
    if not (target.is_contiguous() and source.is_contiguous()):
        if target.dim() != 2 or target.stride(1) != 1 or source.stride(1) != 1:
            return np.empty((0, 3), np.int64)
        rows, size = len(target), size // max(1, len(target))
    pieces = np.empty((rows, 3), np.int64)
    for column, tensor in enumerate((target, source)):
        step = tensor.stride(0) * tensor.element_size() if rows > 1 else 0
        pieces[:, column] = tensor.data_ptr() + step * np.arange(rows)
    pieces[:, 2] = size
    return pieces
