"""Named crash points: the comments `# crash point: NAME` in the sources of `flash_eplb.ipc`.

A process that calls `bring_to_life` before it imports the package runs a call in place of each
comment, in Python functions and in compiled kernels alike; in all others they remain comments.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "ipc"
COMMENT = re.compile(r"^( *)# crash point: ([a-z_.]+)$", re.MULTILINE)


def names() -> list[str]:
    """All crash points, by module and line."""
    return [
        name for file in sorted(SOURCES.glob("*.py")) for _, name in COMMENT.findall(_source(file))
    ]


def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8")


class _Armed:
    pid = 0
    number = -1
    passes = 0


def arm(name: str, passes: int) -> None:
    """Let this process kill itself, and none of its children, at its `passes`-th pass of `name`."""
    _Armed.pid, _Armed.number, _Armed.passes = os.getpid(), names().index(name), passes


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _die(number: int) -> None:
    """What stands for a comment. As a ctypes function it can be called in kernels, too."""
    if number == _Armed.number and os.getpid() == _Armed.pid:
        _Armed.passes -= 1
        if not _Armed.passes:
            os.kill(os.getpid(), signal.SIGKILL)


def revive(source: str) -> str:
    """`source` with calls for comments, line by line.

    Its kernels are not cached: what is compiled here must not be used elsewhere, nor vice versa.
    """
    every = names()
    calls = COMMENT.sub(lambda found: f"{found[1]}_die({every.index(found[2])})", source)
    return calls.replace("cache=True", "cache=False")


class _Loader(SourceFileLoader):
    def get_code(self, fullname):
        return compile(revive(_source(Path(self.path))), self.path, "exec", dont_inherit=True)

    def exec_module(self, module):
        module._die = _die
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        package, _, module = fullname.rpartition(".")
        file = SOURCES / f"{module}.py"
        if package != "flash_eplb.ipc" or not file.exists() or not COMMENT.search(_source(file)):
            return None
        return spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))


def bring_to_life() -> None:
    """Call this before anything of the package is imported."""
    assert not any(name.startswith("flash_eplb.ipc.") for name in sys.modules)
    sys.meta_path.insert(0, _Finder)
