"""Where compiled kernels lie, and that they are those of the source.

Packages with kernels call `provide` when they are imported, so before numba looks for a place. vLLM
imports them in every process: nothing heavy here, least of all numba.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"
_PACKAGES = ("collectors", "ipc", "loaders", "planners")


@functools.cache
def provide() -> str:
    """Name a folder of this user's in NUMBA_CACHE_DIR if numba has no place; "" if it has one.

    Children inherit it. Where the folder cannot be had numba says that it cannot cache.
    """
    with contextlib.suppress(OSError):
        _forget_old_kernels()
    if os.environ.get(VARIABLE) or _has_place():
        return ""
    folder = _own_folder()
    if folder:
        os.environ[VARIABLE] = folder
        if config := sys.modules.get("numba.core.config"):  # somebody was earlier
            config.CACHE_DIR = folder  # type: ignore[attr-defined]
    return folder


def notice() -> str:
    """What to say of the folder, in a sentence; "" if numba has a place of its own."""
    if not (folder := provide()):
        return ""
    return (
        f"numba can keep compiled kernels neither in the package nor in {_user_wide()}: they are "
        f"in {folder}; set {VARIABLE} to have them elsewhere"
    )


def place() -> str:
    """Where numba keeps compiled kernels, in words."""
    return os.environ.get(VARIABLE) or f"{Path(__file__).parent} or {_user_wide()}"


def _forget_old_kernels() -> None:
    """Remove what was compiled in the packages before a source with kernels was changed.

    numba looks at a kernel's own file only, and would keep what others had inlined into it. It is
    the index that goes, so a process that runs meanwhile compiles again, and no more.
    """
    here = Path(__file__).parent
    state = hashlib.sha256()
    for name in _PACKAGES:
        for path in sorted((here / name).glob("*.py")):
            if b"njit" in (source := path.read_bytes()):
                state.update(source)
    stamp = here / "planners" / "__pycache__" / "kernels.sha256"
    if stamp.exists() and stamp.read_text() == state.hexdigest():
        return
    for name in _PACKAGES:
        for index in (here / name / "__pycache__").glob("*.nbi"):
            index.unlink(missing_ok=True)
    fresh = stamp.with_name(f"{stamp.name}.{os.getpid()}")
    stamp.parent.mkdir(exist_ok=True)
    fresh.write_text(state.hexdigest())
    fresh.replace(stamp)


def _has_place() -> bool:
    """Whether numba's own places suffice, tried as it tries them."""
    here = Path(__file__).parent
    if all(_is_writable(str(here / name / "__pycache__")) for name in _PACKAGES):
        return True
    return os.path.isabs(_user_wide()) and _is_writable(_user_wide())


def _user_wide() -> str:
    caches = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return os.path.join(caches, "numba")


def _is_writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _own_folder() -> str:
    """The folder, which nobody else can write to: what lies there is run; "" if it is not ours."""
    try:
        folder = os.path.join(tempfile.gettempdir(), f"flash_eplb-kernels-{os.geteuid()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
    except OSError:
        return ""
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return folder if is_ours and not stat.S_IMODE(status.st_mode) & 0o077 else ""
