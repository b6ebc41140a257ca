"""The feature probe: whether this vLLM has what we rely on (`contract.NEEDS`).

It reads the sources of the modules, not their objects: so it sees how often a method calls another
one and which decorators it bears, imports nothing, and reads a wheel on disk just as well. What it
finds in a version of vLLM is that version's contract.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeGuard

from .contract import NEEDS, Need

Facts = dict[str, dict[str, dict[str, Any]]]
"""By module and by name: "signature" and "decorators" of a function, "calls" that are counted."""


@functools.lru_cache
def probe(runner: str) -> str:
    """Why the installed vLLM cannot be balanced on model runner `runner`; empty if it can.

    Args:
        runner: "V1" or "V2".
    """
    return reason(find_facts(installed_source), runner)


def reason(facts: Facts, runner: str) -> str:
    """The first thing that `facts` lack for model runner `runner`, as a sentence; empty if none."""
    for need in NEEDS:
        if need.optional or need.runner not in ("", runner):
            continue
        if lack := _lack(need, facts.get(need.module, {}).get(need.name)):
            return f"this version of vLLM is not known: {need.module}: {lack}"
    return ""


def find_facts(source: Callable[[str], str | None]) -> Facts:
    """What is there of `NEEDS`.

    Args:
        source: the text of a module, by its dotted name; None if there is no such module.
    """
    facts: Facts = {}
    for module in dict.fromkeys(need.module for need in NEEDS):
        text = source(module)
        found = _names(ast.parse(text)) if text is not None else {}
        for need in NEEDS:
            if need.module == module and need.name in found:
                facts.setdefault(module, {})[need.name] = _fact(need, found[need.name])
    return facts


def installed_source(module: str) -> str | None:
    """The text of a module that could be imported; only its packages are."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.origin:
        return None
    return Path(spec.origin).read_text(encoding="utf-8")


def parameters(signature: str) -> list[str]:
    """The names in a signature in their order, without `self`."""
    function = ast.parse(f"def _({signature}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    parts = function.args
    names = [part.arg for part in (*parts.posonlyargs, *parts.args, *parts.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def _lack(need: Need, fact: dict[str, Any] | None) -> str:
    """What `fact` lacks of `need`; empty if nothing."""
    if fact is None:
        return f"there is no {need.name}"
    if need.first or need.takes:
        names = parameters(fact.get("signature", ""))
        if tuple(names[: len(need.first)]) != need.first:
            return f"{need.name} takes ({', '.join(names)}), not ({', '.join(need.first)}, ...)"
        for name in need.takes:
            if name not in names:
                return f"{need.name} takes ({', '.join(names)}) and no {name}"
    for name in need.decorators:
        if name not in fact.get("decorators", []):
            return f"{need.name} is not decorated with {name}"
    for name, count in need.calls:
        if (found := fact.get("calls", {}).get(name, 0)) != count:
            return f"{need.name} calls {name} {found} times, not {count}"
    return ""


def _fact(need: Need, node: ast.AST) -> dict[str, Any]:
    fact: dict[str, Any] = {}
    if isinstance(node, ast.FunctionDef):
        fact["signature"] = ast.unparse(node.args)
        if names := [_name(decorator) for decorator in node.decorator_list]:
            fact["decorators"] = names
    if need.calls:
        counts = Counter(_name(part) for part in ast.walk(node) if isinstance(part, ast.Call))
        fact["calls"] = {name: counts[name] for name, _ in need.calls}
    return fact


def _names(tree: ast.Module) -> dict[str, ast.AST]:
    """What first defines "function", "Class" and "Class.member" in a module."""
    found: dict[str, ast.AST] = {}
    for node in _statements(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, node)
        if isinstance(node, ast.ClassDef):
            for name, member in _class_members(node):
                found.setdefault(f"{node.name}.{name}", member)
    return found


def _statements(body: Iterable[ast.stmt]) -> Iterable[ast.stmt]:
    """Those of a module or class, within `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements((*node.body, *node.orelse))


def _class_members(owner: ast.ClassDef) -> Iterable[tuple[str, ast.AST]]:
    """Methods, fields, and what any method assigns to `self`."""
    for node in _statements(owner.body):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
            yield from ((part.attr, part) for part in ast.walk(node) if _is_set_on_self(part))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def _is_set_on_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _name(node: ast.AST) -> str:
    """The last name of a call, a decorator or a dotted name."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
