"""Files that commands write: whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import typer


def fail(text: str) -> NoReturn:
    """End the command with 2 and one sentence."""
    typer.echo(f"eplb: {text}", err=True)
    raise typer.Exit(2)


def target(option: str, name: str) -> Path:
    """The file `name` that `option` gives; refused before the work if it cannot be written."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        fail(f"{option} {name} cannot be written; name a file in a folder that is there")
    return path


def write(option: str, path: Path, text: str) -> None:
    """Write `text` so that `path` is there whole or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"{option} {path} cannot be written: {error}")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
