"""Where commands write: files, refused before the work and there in full or not at all; tables."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..planners.whole_file import is_special, try_whole, write_whole
from .choice import fail

if TYPE_CHECKING:
    from .config import Config


_NARROWEST = 80  # columns, in which every table shows its figures in full


def table_console(plain: int) -> Console:
    """The terminal, or `plain` columns of text where there is none; never too narrow for a table,
    which would be cut: a terminal wraps it."""
    found = Console()
    return Console(width=max(_NARROWEST, found.width) if found.is_terminal else plain)


def target_of(option: str, name: str) -> Path | None:
    """The file that `option` names, None for an empty name; ends the command if it has no place."""
    if not name:
        return None
    path = Path(name)
    if why := _why_no_file(path):
        fail(f"{option} {name} cannot be written: {why}; give the path of a file that can be")
    return path


def check_apart(files: dict[str, Path | None]) -> None:
    """End the command with 2 if two of `files`, by what names them, are one: the later one would be
    written over the other."""
    found: dict[str, str] = {}
    for name, path in files.items():
        if path is None or is_special(path):
            continue
        other = found.setdefault(os.path.realpath(path), name)
        if other != name:
            fail(f"{other} and {name} name one file, {path}; give each its own")


def _why_no_file(path: Path) -> str:
    """Why `path` is no file that can be written, nor a device or pipe; "" if it is one."""
    if is_special(path):
        return "" if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
    return "it is a folder" if os.path.isdir(path) else _why_unwritable(path)


def write_text(option: str, target: Path, text: str) -> None:
    """Write the file as a whole; ends the command if that fails."""
    try:
        write_whole(target, text)
    except OSError as error:
        fail(f"{option} {target} cannot be written: {error}")


def write_figures(target: Path, figures: dict[str, Any]) -> None:
    """Write what --json asks for."""
    write_text("--json", target, json.dumps(figures, indent=1) + "\n")


def check_paths(config: Config) -> None:
    """End the command with 2 if what a planner is to write has no place; found now, not after a
    plan."""
    if config.save_placement:
        _check_saved(Path(config.save_placement))
    if config.record:
        check_folder("EPLB_RECORD=", config.record)


def _check_saved(saved: Path) -> None:
    why = ""
    if os.path.isdir(saved):
        why = "is a folder"
    elif not os.path.isdir(saved.parent):
        why = f"{saved.parent} is no folder"
    if why:
        fail(f"EPLB_SAVE_PLACEMENT={saved}: {why}; give the path of a file in one that is there")
    if is_special(saved):  # which keeps no map, and a pipe would hold the planner up
        why = "it is no regular file"
    else:
        why = _why_unwritable(saved)
    if why:
        fail(f"EPLB_SAVE_PLACEMENT={saved}: {why}; give the path of a file that can be written")


def check_folder(option: str, name: str) -> None:
    """End the command with 2 unless the path that `option` names is, or can be made, a folder in
    which something can be made."""
    folder = Path(name)
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        fail(f"{option}{name}: it is no folder; give one, or a path where one can be made")
    if why := _why_unwritable(there / "record"):
        fail(f"{option}{name}: nothing can be made in {there}: {why}; give another folder")


def _why_unwritable(path: Path) -> str:
    """Why no file can be made there as `write_whole` does; "" if one can."""
    try:
        try_whole(path)
    except OSError as error:
        return error.strerror or str(error)
    return ""
