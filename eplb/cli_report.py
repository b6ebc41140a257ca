"""The command `eplb report`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .choice import fail, one_sentence
from .output import check_apart, target_of, write_text
from .progress import watched

if TYPE_CHECKING:
    from ..planners.recording import Recording

_PAGE = "report.html"


def report(
    folder: Annotated[str, typer.Argument(help="Folder of EPLB_RECORD or `eplb record`.")],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help=f"The page; {_PAGE} if neither this nor --trace is given."
        ),
    ] = "",
    trace: Annotated[
        str, typer.Option(help="Write the time line for Perfetto here, as Chrome trace events.")
    ] = "",
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
) -> None:
    """Draw a recording as one page that needs no network, or as a time line for Perfetto.

    Example: eplb report recording -o report.html --trace trace.json
    """
    output = output or ("" if trace else _PAGE)
    page, timeline = target_of("-o", output), target_of("--trace", trace)
    check_apart({"-o": page, "--trace": timeline})
    if page is not None:
        _need_plotly()
    said = []
    try:
        with one_sentence():
            from ..planners.recording import Recording

            recording = Recording(folder)
            if page is not None:
                title = title or f"Expert balance: {Path(folder).resolve().name}"
                said.append(_write_page(recording, page, title))
            if timeline is not None:
                said.append(_write_trace(recording, timeline))
    finally:  # what is written stays, whatever comes after it
        for line in said:
            typer.echo(line)


def _need_plotly() -> None:
    try:
        import plotly  # noqa: F401
    except ImportError:
        fail("a page is drawn by plotly, which is not here: pip install plotly")


def _write_page(recording: Recording, path: Path, title: str) -> str:
    """Write the page; what is to be said of it."""
    from .report.measured import measure
    from .report.page import page

    found = measure(recording, functools.partial(watched, what="reading"))
    text = page(title, recording, found).encode(errors="replace").decode()  # paths may be no UTF-8
    write_text("-o", path, text)
    return f"{path}: {found.steps} steps, {len(text.encode()) / 2**20:.1f} MiB"


def _write_trace(recording: Recording, path: Path) -> str:
    """Write the time line; what is to be said of it."""
    from .report.trace import trace_of

    found = trace_of(recording, functools.partial(watched, what="tracing"))
    write_text(
        "--trace", path, json.dumps(found.content, separators=(",", ":"), allow_nan=False) + "\n"
    )
    left = found.steps - found.holds
    older = f"; {left} older steps are left out" if left else ""
    return f"{path}: spans of {found.holds} steps{older}; open it at ui.perfetto.dev"
