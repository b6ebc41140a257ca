"""Files that commands write: refused before the work, and there in full or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .choice import fail


def target_of(option: str, name: str) -> Path | None:
    """The file that `option` names, None for an empty name; ends the command if it has no place."""
    if not name:
        return None
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        fail(f"{option} {name} cannot be written; name a file in a folder that is there")
    return path


def write_text(option: str, target: Path, text: str) -> None:
    """Write the file by another name and rename it; ends the command if that fails."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"{option} {target} cannot be written: {error}")


def write_figures(target: Path, figures: dict[str, Any]) -> None:
    """Write what --json asks for."""
    write_text("--json", target, json.dumps(figures, indent=1) + "\n")
