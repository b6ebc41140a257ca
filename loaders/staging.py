"""Staging: rows that hold experts on their way.

A row holds one expert of one layer. Rows are allocated once; a round fills them while inference
goes on, and its commit copies them into live slots.

An engine keeps what the experts of a layer have in common as one tensor [slots, ...], or as a list
of one tensor per slot. Of the first kind a row holds the bytes, one tensor after the other, so it
serves all layers. A tensor of the second kind may have a layout of its own on its device, so it
travels as it is, and a row holds its like.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ..device import device_of

_ALIGNMENT = 16  # bytes; so that a device reads whole words

Stack = torch.Tensor | list[torch.Tensor]
"""A tensor [slots, ...] or one tensor per slot."""

Form = tuple[tuple[torch.dtype, tuple[int, ...]], ...]


def row_bytes(weights: Sequence[Sequence[Stack]]) -> tuple[int, ...]:
    """Bytes of one expert, per layer, of `weights` (per layer, stacks of its tensors)."""
    return tuple(sum(_sizes(layer)) for layer in weights)


def default_rows(row: int) -> int:
    """Staging rows where nobody says how many: few large ones, for each is a pause in a commit, and
    many small ones, for each round takes some steps. `row`: bytes of the largest expert."""
    return min(64, max(8, 2**22 // max(1, row)))


def first_tensor(weights: Sequence[Sequence[Stack]]) -> torch.Tensor:
    """A tensor of `weights`; the others lie on its device."""
    return weights[0][0][0]


def slot_views(layer: Sequence[Stack], slot: int) -> list[torch.Tensor]:
    """What travels of each tensor of the expert in `slot`, without a copy.

    That is the bytes (uint8, one dimension) of a tensor [slots, ...], and a tensor of its own as it
    is, its dimensions in the order of memory.

    Raises:
        ValueError: a tensor is not contiguous, or has gaps, so that it cannot be sent.
    """
    return [
        dense(stack[slot]) if isinstance(stack, list) else plain_bytes(stack[slot])
        for stack in layer
    ]


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with its dimensions in the order of memory; ValueError if it has gaps."""
    if tensor.is_contiguous():
        return tensor
    strides = _strides(tensor)
    order = sorted(range(tensor.dim()), key=lambda d: (strides[d], tensor.shape[d]), reverse=True)
    ordered = tensor.permute(order)
    if not ordered.is_contiguous():
        raise ValueError(
            f"an expert tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} has gaps"
        )
    return ordered


def slot_forms(stack: Stack) -> list[str]:
    """What lies in each slot of `stack`, in words; equal where the same bytes are the same weights.

    That is dtype and shape and, of a tensor of its own, stride; where it has one element only, a
    dimension's stride means nothing and is 0. Of a tensor [slots, ...] it stands once for all.
    """
    if not isinstance(stack, list):
        return [_kind(stack[0])]
    return [f"{_kind(tensor)} of stride {_strides(tensor)}" for tensor in stack]


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of `tensor`, 0 where one says nothing of where its elements lie."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return tuple(stride if size > 1 else 0 for stride, size in pairs)


def plain_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor`, uint8 of one dimension; ValueError if it is not contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"an expert tensor of shape {tuple(tensor.shape)} is not contiguous")
    return tensor.view(-1).view(torch.uint8)


class Staging:
    """`rows` rows, each with room for an expert of any layer of `weights`, on their device.

    Args:
        weights: per layer, stacks of its tensors.
        rows: how many.
        buffer: stacks for n experts that the engine has allocated and does not use: they are the
            first n rows, if an expert of every layer fits into them tensor by tensor.

    Raises:
        MemoryError: there is no room for the rows.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[Stack]],
        rows: int,
        buffer: Sequence[Stack] = (),
    ):
        self._weights = weights
        self.borrowed = min(rows, len(buffer[0])) if _fits(weights, buffer) else 0
        self._buffer = [slot_views(buffer, row) for row in range(self.borrowed)]
        own = rows - self.borrowed
        # An engine makes us within inference mode; the stager's thread, which writes, is outside.
        with torch.inference_mode(False), _room_for(own, weights):
            self._likes = _rows_like(weights, own)
            self._forms = [_form(layer) if _is_listed(layer) else None for layer in weights]
            flat = [layer for layer in weights if not _is_listed(layer)]
            width = max((sum(map(_aligned, _sizes(layer))) for layer in flat), default=0)
            self._rows = torch.empty(
                (own, width if own else 0), dtype=torch.uint8, device=first_tensor(weights).device
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that were allocated; those of the engine's buffer do not count."""
        likes = (tensor for rows in self._likes.values() for row in rows for tensor in row)
        return self._rows.numel() + sum(tensor.nbytes for tensor in likes)

    def views(self, row: int, layer: int) -> list[torch.Tensor]:
        """Row `row` cut into the tensors of an expert of `layer`, as `slot_views` gives them."""
        form = self._forms[layer]
        if form is not None:
            borrowed = row < self.borrowed
            return self._buffer[row] if borrowed else self._likes[form][row - self.borrowed]
        sizes = _sizes(self._weights[layer])
        if row < self.borrowed:
            return [part[:size] for part, size in zip(self._buffer[row], sizes, strict=False)]
        views = []
        start = 0
        for size in sizes:
            views.append(self._rows[row - self.borrowed, start : start + size])
            start += _aligned(size)
        return views


@contextlib.contextmanager
def _room_for(rows: int, weights: Sequence[Sequence[Stack]]) -> Iterator[None]:
    """MemoryError that tells the remedy, where torch finds no memory for `rows` rows."""
    try:
        yield
    except RuntimeError as error:
        raise MemoryError(
            f"{rows} staging rows of {max(row_bytes(weights)) / 2**20:.1f} MiB do not fit into the "
            f"memory of {first_tensor(weights).device}; lower EPLB_STAGING_ROWS, or leave more of "
            f"it free (on a GPU: --gpu-memory-utilization): {str(error).splitlines()[0]}"
        ) from error


def _rows_like(
    weights: Sequence[Sequence[Stack]], rows: int
) -> dict[Form, list[list[torch.Tensor]]]:
    """By form, `rows` rows of tensors like those of an expert whose tensors are its own."""
    made: dict[Form, list[list[torch.Tensor]]] = {}
    for layer in weights:
        if _is_listed(layer) and (form := _form(layer)) not in made:
            like = device_of(first_tensor([layer])).empty_like
            made[form] = [[like(view) for view in slot_views(layer, 0)] for _ in range(rows)]
    return made


def _is_listed(layer: Sequence[Stack]) -> bool:
    return any(isinstance(stack, list) for stack in layer)


def _form(layer: Sequence[Stack]) -> Form:
    """What two experts have in common that fit into the same row of tensors.

    All slots of `layer` are like the first (`slot_forms`), or nothing is staged.
    """
    return tuple((view.dtype, tuple(view.shape)) for view in slot_views(layer, 0))


def _sizes(layer: Sequence[Stack]) -> list[int]:
    """Bytes of one expert's part of each tensor."""
    return [stack[0].numel() * stack[0].element_size() for stack in layer]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _fits(weights: Sequence[Sequence[Stack]], buffer: Sequence[Stack]) -> bool:
    """Whether an expert of any layer fits into a row of `buffer`, tensor by tensor."""
    if not buffer or not len(buffer[0]):
        return False
    if any(map(_is_listed, (buffer, *weights))):
        return all(_form(layer) == _form(buffer) for layer in weights)
    if any(not stack[0].is_contiguous() for stack in buffer):
        return False
    room = _sizes(buffer)
    return all(
        len(layer) <= len(room)
        and all(size <= space for size, space in zip(_sizes(layer), room, strict=False))
        for layer in weights
    )
