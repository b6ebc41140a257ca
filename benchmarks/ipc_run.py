"""What lasts for a run: its folder and names, the peers' servers, and the reader's process."""

from __future__ import annotations

import functools
import multiprocessing as mp
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from multiprocessing.managers import SyncManager
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np

from .ipc_ends import Reader, Size, Writer
from .ipc_peers import KINDS

CONTEXT = mp.get_context("spawn")
STOP, DONE = 0, 1  # words that both processes see
LONGEST = 120.0  # seconds that an answer of the reader may take
_DIGIT = 4096  # of the numbers of records: as large as a count


class PeerError(Exception):
    """A peer does not run or does not deliver what was written; it says why."""


class Run:
    """One process's view of the run; the reader's has no `reader` and starts nothing.

    Attributes:
        prefix: begins every name in /dev/shm that a run gives itself.
        folder: of everything temporary, the peers' sockets and files included.
        queue: the peer of that name; a process can only inherit it.
        words: shared int64 words.
    """

    def __init__(self, prefix: str, folder: str, queue: Any, words: Any):
        self.prefix, self.folder, self.queue, self.words = prefix, folder, queue, words
        self.stack = ExitStack()

    @functools.cached_property
    def manager(self) -> SyncManager:
        """The Manager, started when it is first asked for."""
        manager = SyncManager(ctx=CONTEXT)
        manager.start(ignore_interrupts)
        self.stack.callback(manager.shutdown)
        return manager

    @functools.cached_property
    def reader(self) -> ReaderProcess:
        """The other process, started when it is first asked for."""
        reader = ReaderProcess((self.prefix, self.folder, self.queue, self.words))
        self.stack.callback(reader.close)
        return reader


@contextmanager
def running(depth: int) -> Iterator[Run]:
    """A run whose queue holds `depth` records; all that it made is gone when the process ends."""
    prefix = f"eplb-bench-{os.getpid()}"
    folder = tempfile.mkdtemp(prefix="eplb-bench-")
    # after multiprocessing has removed its own folder, which lies in this one
    Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)
    before = os.environ.get("TMPDIR")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run = Run(prefix, folder, CONTEXT.Queue(depth), CONTEXT.RawArray("q", 8))
        with run.stack:
            run.queue.cancel_join_thread()
            yield run
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for path in Path("/dev/shm").glob(f"{prefix}-*"):
            path.unlink(missing_ok=True)
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)


class ReaderProcess:
    """The reading process, seen from the writer's."""

    def __init__(self, view: tuple[Any, ...]):
        self._words = view[3]
        self._control, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, view), daemon=True)
        self._process.start()
        theirs.close()

    def attach(self, name: str, size: Size, writer: Writer) -> None:
        """Open the reader's end of peer `name`, in the place of an earlier one."""
        self._ask("attach", name, size, writer.handle())
        self._send("ready", name)
        writer.ready()
        self._answer()

    def detach(self, name: str) -> None:
        """Close the reader's end."""
        self._ask("detach", name)

    def following(self, name: str, sent: np.ndarray) -> AbstractContextManager[list[Any]]:
        """Read what comes meanwhile, and check that it is `sent`, its stamps aside."""
        return self._reading("follow", name, sent)

    def counting(self, name: str, first: int, wanted: int) -> AbstractContextManager[list[Any]]:
        """Receive `wanted` records stamped `first` or later; DONE is then set.

        The list holds afterwards (received, lost before the last one, when that came).
        """
        return self._reading("count", name, first, wanted)

    @contextmanager
    def _reading(self, *command: Any) -> Iterator[list[Any]]:
        self._words[STOP] = self._words[DONE] = 0
        self._ask(*command)
        answers: list[Any] = []
        try:
            yield answers
        finally:
            self._words[STOP] = 1
            answers.append(self._answer())

    def _ask(self, *command: Any) -> Any:
        self._send(*command)
        return self._answer()

    def _send(self, *command: Any) -> None:
        self._control.send(command)

    def _answer(self) -> Any:
        if not self._control.poll(LONGEST):
            raise PeerError("the reader does not answer")
        try:
            error, answer = self._control.recv()
        except EOFError:
            raise PeerError("the reader's process is gone") from None
        if error:
            raise PeerError(error)
        return answer

    def close(self) -> None:
        """End the process."""
        self._words[STOP] = 1
        with suppress(OSError):
            self._control.send(("quit",))
        self._control.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(control: Any, view: Sequence[Any]) -> None:
    """The reader's process: one command after the other, and an answer (error, what) to each."""
    ignore_interrupts()
    run = Run(*view)
    readers: dict[str, Reader] = {}
    with suppress(EOFError, OSError):  # the writer's process is gone
        while (command := control.recv())[0] != "quit":
            try:
                answer = (None, _obey(run, readers, control, *command))
            except Exception as error:
                answer = (f"{type(error).__name__}: {error}", None)
            control.send(answer)
    for name in list(readers):
        readers.pop(name).close()


def _obey(run: Run, readers: dict[str, Reader], control: Any, verb: str, name: str, *rest) -> Any:
    if verb == "attach":
        readers[name] = KINDS[name].reader(run, *rest)
    elif verb == "ready":
        readers[name].ready()
    elif verb == "detach":
        readers.pop(name).close()
    elif verb == "follow":
        control.send((None, None))  # about to read
        return _follow(run.words, readers[name], *rest)
    elif verb == "count":
        control.send((None, None))
        return _count(run.words, readers[name], *rest)
    return None


def _follow(words: Any, reader: Reader, sent: np.ndarray) -> None:
    checked = False
    while True:
        stopping = words[STOP]
        records = reader.take()
        _stamps(records)
        if len(records) and not checked:
            _check(records[-1], sent)
            checked = True
        if stopping and (reader.pause or not len(records)):
            break
        time.sleep(reader.pause)
    if not checked:
        raise PeerError("nothing was received")


def _count(words: Any, reader: Reader, first: int, wanted: int) -> tuple[int, int, int]:
    received, latest = 0, first - 1
    try:
        while received < wanted and not words[STOP]:
            stamps = _stamps(reader.take())
            received += int((stamps > latest).sum())
            latest = max(latest, int(stamps.max(initial=latest)))
        return received, latest - first + 1 - received, time.monotonic_ns()
    finally:
        words[DONE] = 1


def _check(record: np.ndarray, sent: np.ndarray) -> None:
    if not np.array_equal(record.ravel()[2:-2], sent.ravel()[2:-2]):
        raise PeerError("what was received is not what was written")


def stamp(counts: np.ndarray, number: int) -> None:
    """Write the number of a record to its first two and its last two cells, as counts might be."""
    counts[0, :2] = counts[-1, -2:] = divmod(number, _DIGIT)


def _stamps(records: np.ndarray) -> np.ndarray:
    """The numbers of the records; see `stamp`."""
    digits = records[:, 0, :2]
    if not np.array_equal(digits, records[:, -1, -2:]):
        raise PeerError("a record was torn")
    return digits @ (_DIGIT, 1)


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the writer's process ends this one


def _terminate(*_: Any) -> None:
    raise SystemExit(143)
