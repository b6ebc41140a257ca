"""One file of a recording: what is in it, how it is written and read. See docs/recording.md."""

from __future__ import annotations

import errno
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..ipc.placement import MOVE
from ..ipc.round_log import TRANSFER

FORMAT = "flash_eplb recording"
VERSION = 1

PLAN = np.dtype(
    [
        ("plan", "<i4"),
        ("epoch", "<i8"),
        ("layers", "<i4"),
        ("moves", "<i4"),
        ("rounds", "<i4"),
        ("par_before", "<f8"),
        ("par_after", "<f8"),
        ("seconds", "<f8"),
        ("sent_ns", "<i8"),
    ]
)
"""A plan that was sent; the PAR are means over the layers that it changes."""

PLAN_LAYER = np.dtype(
    [("plan", "<i4"), ("layer", "<i4"), ("par_before", "<f8"), ("par_after", "<f8")]
)
"""A layer that a plan changes."""

PLAN_MOVE = np.dtype([("plan", "<i4"), *MOVE.descr])
"""A slot that a plan writes."""

OUTCOME = np.dtype([("plan", "<i4"), ("committed", "?"), ("time_ns", "<i8")])
"""How a plan ended: committed on all ranks, or given up."""

RANK_TRANSFER = np.dtype([("rank", "<i4"), *TRANSFER.descr])
"""How a round went on a rank; fields of `ipc.round_log.Transfer`."""

TABLES = {
    "plans": PLAN,
    "plan_layers": PLAN_LAYER,
    "plan_moves": PLAN_MOVE,
    "outcomes": OUTCOME,
    "transfers": RANK_TRANSFER,
}
ADDED_TABLES = ("transfers",)
"""Tables that early chunks of this version lack, as if they were empty there."""

STEP_FIELDS = ("steps", "time_ns", "tokens", "flags", "epochs", "spans")

_COUNTS = ("layers", "experts", "ranks", "slots", "run")
_MORE_COUNTS = ("staging_rows", "lost", "dropped")  # which a header may lack, as those below
_KINDS = {"models": list, "row_bytes": list, "settings": dict}

_NAME = re.compile(r"[0-9]{6,}\.npz")
TEMPORARY = ".tmp"
_OF_BYTES = (None, errno.EINVAL)  # numbers of errors that damaged bytes lead to: they name places
_LEVEL = 1  # of zlib: level 6 takes five times as long for a few per cent


class ChunkError(ValueError):
    """A file that is no chunk, a damaged one, or one of another version."""


def chunk_files(folder: Path) -> list[Path]:
    """The chunks in `folder`, oldest first; temporary and other files are left out."""
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.stem))


def write_chunk(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` so that `path` is there whole or not at all, whatever dies meanwhile.

    Raises:
        OSError: it cannot be written; nothing is left then.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as packed:
                for name, array in arrays.items():
                    with packed.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a chunk, whose format and version are ours.

    Raises:
        ChunkError: it has none.
    """
    return read_chunk(path, ["header"])[0]


def read_chunk(path: Path, names: list[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header, the arrays `names`) of a chunk, checked against its header.

    Raises:
        ChunkError: it is damaged, no chunk, or of another version.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile) or "header" not in file.files:
                raise ChunkError(f"{path} is no chunk of a recording: it has no header")
            header = _checked_header(path, str(file["header"]))
            return header, {name: _array(file, name) for name in names if name != "header"}
    except ChunkError:
        raise
    except FileNotFoundError:
        raise ChunkError(f"{path} is gone: is its recording still rotated? Read it again") from None
    except PermissionError:  # nothing is wrong with it
        raise forbidden(path) from None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in _OF_BYTES:
            raise ChunkError(
                f"{path} cannot be read: {error.strerror}; it may be whole, read it again once "
                "that is mended"
            ) from error
        raise damaged(path, reason(error)) from error
    except Exception as error:  # zlib.error and what else damaged bytes lead to
        raise damaged(path, f"{type(error).__name__}: {reason(error)}") from error


def _array(file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    if name in ADDED_TABLES and name not in file.files:
        return np.empty(0, TABLES[name])
    return file[name]


def reason(error: Exception) -> str:
    """Why a file could not be read, in a line; numpy's advice is to run the code in it."""
    if "pickle" in str(error) and not isinstance(error, OSError):  # which names the file
        return "it holds something else than arrays of numbers"
    return (str(error).splitlines() or [type(error).__name__])[0]


def forbidden(path: Path) -> ChunkError:
    """The error for a chunk, or the folder of one, that is kept from us."""
    return ChunkError(
        f"{path} may not be read by this user; read it as the one who recorded it, or let others "
        "read it (chmod)"
    )


def damaged(path: Path, why: str) -> ChunkError:
    """The error for a chunk that is damaged."""
    return ChunkError(f"{path} is damaged ({why}); remove it to read the other chunks")


def _checked_header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ChunkError(f"{path} is no chunk of a recording: its header says otherwise")
    if header.get("version") != VERSION:
        raise ChunkError(
            f"{path} has version {header.get('version')} of the format; this flash_eplb reads "
            f"version {VERSION}: use the one that recorded it"
        )
    if (odd := next(_odd_fields(header), None)) is not None:
        raise damaged(path, f"its header gives {odd} as {header.get(odd)!r}")
    return header


def _odd_fields(header: dict[str, Any]) -> Iterator[str]:
    """Those of which a reader could make nothing."""
    yield from (name for name in _COUNTS if not _is_count(header.get(name)))
    yield from (name for name in _MORE_COUNTS if not _is_count(header.get(name, 0)))
    for name, kind in _KINDS.items():
        if not isinstance(header.get(name, kind()), kind):
            yield name
    if not all(map(_is_count, header.get("row_bytes", []))):
        yield "row_bytes"
    if not _is_count(header.get("settings", {}).get("episode_steps", 0)):
        yield "settings"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def narrowest(counts: np.ndarray) -> np.ndarray:
    """`counts` (not negative) in uint16, int32 or int64, whatever holds the largest."""
    largest = int(counts.max()) if counts.size else 0
    for kind in (np.uint16, np.int32):
        if largest <= np.iinfo(kind).max:
            return counts.astype(kind)
    return counts.astype(np.int64)
