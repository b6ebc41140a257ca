"""What decides placements, and the choice of it by name; imports nothing heavy by itself."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from .plan import Plan

log = logging.getLogger("flash_eplb.planner")

GROUP = "flash_eplb.policies"
"""Entry points of this group are policies: callables (ranks, slots_per_rank, ranks_per_node)."""

DEFAULT = "flashlb"

BUILT_IN = {
    "flashlb": "flashlb:FlashLB",
    "static": "baselines:Static",
    "random": "baselines:Random",
    "deepseek": "deepseek:DeepSeek",
    "swap": "swap:Swap",
}
"""Our own policies: module of this folder and class."""


class Policy(Protocol):
    """What decides placements; FlashLB and its alternatives have this form."""

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> Plan | np.ndarray:
        """What to do about the heat of one window.

        Args:
            heat: tokens[episodes, layers, experts], oldest episode first.
            placement: int32[layers, ranks, slots], today's placement.

        Returns:
            A plan that starts from `placement`, or just the placement int[layers, ranks, slots]
            that is wanted. See `plan.make_plan`; only the set of experts on each rank counts.
        """
        ...


class PolicyError(ValueError):
    """A policy that is not there, does not load or cannot be made; the text names EPLB_POLICY."""


@dataclass(frozen=True)
class Choice:
    """A policy that was found and loaded. See `choose_policy`.

    Attributes:
        name: as in EPLB_POLICY.
        factory: makes the policy.
        module: where its optional function `warmup()` is.
        options: what `make` passes on by keyword; empty for an entry point, which takes none.
    """

    name: str
    factory: Callable[..., Any]
    module: str
    options: frozenset[str]

    def make(
        self, ranks: int, slots_per_rank: int, ranks_per_node: int | None = None, **options: Any
    ) -> Policy:
        """The policy for a group of this shape. See `make_policy`."""
        if self.name in BUILT_IN:
            options["ranks_per_node"] = ranks_per_node
            given = {key: value for key, value in options.items() if key in self.options}
            try:
                return self.factory(ranks, slots_per_rank, **given)
            except ValueError as error:
                raise PolicyError(
                    f"EPLB_POLICY={self.name!r} cannot be made for {ranks} ranks x "
                    f"{slots_per_rank} slots: {error}"
                ) from error
        try:
            policy = self.factory(ranks, slots_per_rank, ranks_per_node)
        except (Exception, SystemExit) as error:  # it is not ours: it may do anything
            raise PolicyError(
                f"EPLB_POLICY={self.name!r} cannot be made for {ranks} ranks x {slots_per_rank} "
                f"slots: {_in_words(error)}"
            ) from error
        if not callable(getattr(policy, "plan", None)):
            raise PolicyError(
                f"EPLB_POLICY={self.name!r} gives an object of type {type(policy).__name__}, "
                "which has no method plan(heat, placement)"
            )
        return policy

    def warm_up(self) -> None:
        """Compile the policy's kernels: call the `warmup()` of its module, if it has one.

        Raises:
            PolicyError: it fails.
            OSError: the kernels of one of ours find no room on the disk.
        """
        warmup = getattr(importlib.import_module(self.module), "warmup", None)
        if warmup is None:
            return
        try:
            warmup()
        except (Exception, SystemExit) as error:
            if self.name in BUILT_IN and isinstance(error, OSError):
                raise  # which is no fault of the policy
            raise PolicyError(
                f"EPLB_POLICY={self.name!r} cannot be used: {self.module}.warmup() failed with "
                f"{_in_words(error)}"
            ) from error


def known_policies() -> list[str]:
    """The names that `choose_policy` takes: ours first, then those of entry points."""
    return [*BUILT_IN, *sorted({entry.name for entry in _entries()} - BUILT_IN.keys())]


def choose_policy(name: str) -> Choice:
    """Find the policy `name` and import its module.

    Our own win over an entry point of the same name, which is logged.

    Raises:
        PolicyError: no policy has this name, several have it, or its entry point does not load.
    """
    entries = [entry for entry in _entries() if entry.name == name]
    if name in BUILT_IN:
        for entry in entries:
            log.warning("%s is ignored: the name is one of our own policies", _said(entry))
        return _own(name)
    if not entries:
        raise PolicyError(
            f"EPLB_POLICY={name!r} names no policy; known are {', '.join(known_policies())} "
            f"(your own needs an entry point of the group {GROUP})"
        )
    if len({entry.value for entry in entries}) > 1:
        several = " and ".join(map(_said, entries))
        raise PolicyError(f"EPLB_POLICY={name!r} names several: {several}; uninstall all but one")
    return Choice(name, _loaded(entries[0]), entries[0].module, frozenset())


def make_policy(
    name: str, ranks: int, slots_per_rank: int, ranks_per_node: int | None = None, **options: Any
) -> Policy:
    """The policy `name` for a group of this shape.

    Args:
        name: one of `known_policies()`.
        ranks: EP ranks.
        slots_per_rank: slots of each layer on each rank.
        ranks_per_node: consecutive ranks that share a node; None if that is not known.
        options: settings by keyword, such as min_gain; a policy of ours gets those that it takes,
            an entry point gets none.

    Raises:
        PolicyError: see `choose_policy`; an entry point fails, or gives nothing with a `plan`; or
            an argument of a policy of ours is out of range, as the ValueError that caused it says.
    """
    return choose_policy(name).make(ranks, slots_per_rank, ranks_per_node, **options)


def _own(name: str) -> Choice:
    file, _, attribute = BUILT_IN[name].partition(":")
    module = importlib.import_module(f".{file}", __package__)
    factory = getattr(module, attribute)
    options = inspect.signature(factory).parameters.keys()
    return Choice(name, factory, module.__name__, frozenset(options))


def _entries() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


def _loaded(entry: EntryPoint) -> Callable[..., Any]:
    try:
        factory = entry.load()
    except (Exception, SystemExit) as error:
        raise PolicyError(
            f"EPLB_POLICY={entry.name!r}: {_said(entry)} does not load: {_in_words(error)}"
        ) from error
    if not callable(factory):
        raise PolicyError(
            f"EPLB_POLICY={entry.name!r}: {_said(entry)} is of type {type(factory).__name__}; it "
            "must be a callable (ranks, slots_per_rank, ranks_per_node) that gives a policy"
        )
    return factory


def _said(entry: EntryPoint) -> str:
    package = f" of the package {entry.dist.name}" if entry.dist else ""
    return f"the entry point {entry.name} = {entry.value}{package}"


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
