"""Forms of expert tensors: alike in all slots of all ranks and each by itself, or nothing may move.

An expert travels as the bytes of its tensors in the order of memory. Where a tensor is of another
type, shape or order of dimensions, the same bytes are other weights, and their digest is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import xxhash

from ..loaders.staging import Stack, slot_forms
from .group import Group, UnsupportedError
from .ranges import range_of

_WHY = "experts travel as bytes, which are other weights there; load all experts in one layout"


def agree_on_forms(group: Group, weights: Sequence[Sequence[Stack]]) -> None:
    """That each tensor is of one form in all slots of all ranks; a collective of all ranks.

    What is exchanged is a digest per layer, and the forms of the first layer that differs.

    Args:
        group: whose ranks have as many layers as this one.
        weights: of this rank.

    Raises:
        UnsupportedError: on all ranks; names the first tensor that differs.
    """
    mine: list[list[str]] = []

    def look() -> None:
        mine.extend(_of_layer(*pair) for pair in enumerate(weights))
        _check_apart(weights)

    group.together(look)
    digests = group.gather([xxhash.xxh3_64_intdigest(repr(layer).encode()) for layer in mine])
    for number, layer in enumerate(mine):
        if any(theirs[number] != digests[0][number] for theirs in digests):
            raise UnsupportedError(_difference(number, group.gather(layer)))


def _check_apart(weights: Sequence[Sequence[Stack]]) -> None:
    """UnsupportedError if two slots lie in the same memory: a write to one changes both."""
    rows = sorted(
        (*range_of(row), f"layer {layer} tensor {tensor} slot {slot}")
        for layer, stacks in enumerate(weights)
        for tensor, stack in enumerate(stacks)
        for slot, row in enumerate(stack)
        if row.numel()
    )
    for (_, end, one), (start, _, other) in itertools.pairwise(rows):
        if start < end:
            raise UnsupportedError(
                f"{one} and {other} lie in the same memory: an expert that moves to one would "
                "change the other, too"
            )


def _of_layer(number: int, layer: Sequence[Stack]) -> list[str]:
    """The form of each tensor of layer `number`; UnsupportedError if slots differ."""
    found = [slot_forms(stack) for stack in layer]
    for tensor, forms in enumerate(found):
        for slot, form in enumerate(forms):
            if form != forms[0]:
                raise UnsupportedError(
                    f"layer {number} tensor {tensor} is {form} in slot {slot} and {forms[0]} in "
                    f"slot 0: {_WHY}"
                )
    return [forms[0] for forms in found]


def _difference(number: int, everyone: list[list[str]]) -> str:
    """What differs between the first rank that differs and rank 0.

    Args:
        number: of the layer.
        everyone: the form of each of its tensors, of every rank; not all alike.
    """
    first = everyone[0]
    rank = next(rank for rank, theirs in enumerate(everyone) if theirs != first)
    theirs = everyone[rank]
    if len(theirs) != len(first):
        return (
            f"layer {number} has {len(theirs)} expert tensors on EP rank {rank} and {len(first)} "
            f"on EP rank 0: {_WHY}"
        )
    tensor = next(place for place, form in enumerate(theirs) if form != first[place])
    return (
        f"layer {number} tensor {tensor} is {theirs[tensor]} on EP rank {rank} and "
        f"{first[tensor]} on EP rank 0: {_WHY}"
    )
