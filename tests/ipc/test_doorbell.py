import asyncio
import fcntl
import os
import select
import threading

import pytest
import uvloop

from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import bell_name


@pytest.fixture
def name(session):
    return bell_name(session)


@pytest.fixture
def ends(name):
    """(worker's end, planner's end)."""
    worker = Doorbell.create(name)
    planner = Doorbell.open(name)
    yield worker, planner
    planner.close()
    worker.close()


def waits(bell):
    """Whether a bell waits."""
    poll = select.poll()  # select() takes no descriptor above 1,023
    poll.register(bell.descriptor, select.POLLIN)
    return bool(poll.poll(0))


def test_a_ring_before_anyone_looks_is_seen(ends):
    worker, planner = ends
    assert not waits(planner)
    worker.ring()
    assert waits(planner)
    assert planner.drain() == 1
    assert not waits(planner)
    assert planner.drain() == 0


def test_a_ring_before_the_planner_opens_it_is_seen(name):
    worker = Doorbell.create(name)
    worker.ring()
    planner = Doorbell.open(name)
    assert planner.drain() == 1
    planner.close()
    worker.close()


@pytest.mark.parametrize("rings", [1, 2, 5, 4096, 4097, 100_000])
def test_rings_that_nobody_takes_never_block(ends, rings):
    worker, planner = ends
    room = fcntl.fcntl(worker.descriptor, fcntl.F_GETPIPE_SZ)
    for _ in range(rings):
        worker.ring()
    assert planner.drain() == min(rings, room)
    worker.ring()
    assert planner.drain() == 1


def test_it_rings_for_another_process(name, start):
    worker = Doorbell.create(name)
    script = start(
        "import select, sys\n"
        "from flash_eplb.ipc.doorbell import Doorbell\n"
        "bell = Doorbell.open(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "select.select([bell.descriptor], [], [])\n"
        "print(bell.drain(), flush=True)\n",
        name,
    )
    script.line()
    worker.ring()
    assert script.line() == "1"
    worker.close()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_event_loop_wakes_for_each_ring(ends, new_loop):
    worker, planner = ends

    async def wait_for_rings():
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        loop.add_reader(planner.descriptor, woken.set)
        for _ in range(3):
            thread = threading.Thread(target=worker.ring)
            thread.start()
            bells = 0
            while not bells:  # a loop may call a reader once more than needed
                await asyncio.wait_for(woken.wait(), 60)
                woken.clear()
                bells = planner.drain()
            assert bells == 1
            thread.join()
        loop.remove_reader(planner.descriptor)

    loop = new_loop()
    try:
        loop.run_until_complete(wait_for_rings())
    finally:
        loop.close()


def test_the_owner_removes_it_and_may_close_twice(name):
    worker = Doorbell.create(name)
    planner = Doorbell.open(name)
    planner.close()
    planner.close()
    Doorbell.open(name).close()
    worker.close()
    worker.close()
    with pytest.raises(SegmentError, match=f"doorbell {name} cannot be opened: No such file"):
        Doorbell.open(name)


def test_a_forked_child_closes_its_copy_and_removes_nothing(name, start):
    script = start(
        "import os, sys\n"
        "from flash_eplb.ipc.doorbell import Doorbell\n"
        "bell = Doorbell.create(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    bell.close()\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print('closed', flush=True)\n"
        "sys.stdin.read()\n"
        "bell.close()\n",
        name,
    )
    script.line()
    Doorbell.open(name).close()
    assert script.end() == 0


def test_a_leftover_is_replaced(name):
    leftover = Doorbell.create(name)
    leftover.ring()
    worker = Doorbell.create(name)
    planner = Doorbell.open(name)
    assert planner.drain() == 0
    worker.ring()
    assert planner.drain() == 1
    planner.close()
    worker.close()
    leftover.close()


def test_only_the_user_may_open_it(ends):
    assert os.fstat(ends[0].descriptor).st_mode & 0o777 == 0o600


def leave_file(path):
    with open(path, "w") as file:
        file.write("something")


@pytest.mark.parametrize(
    ("leave", "why"),
    [
        (leave_file, "it is no FIFO; remove it"),
        (lambda path: os.symlink("/dev/null", path), "it is no FIFO; remove it"),
        (os.mkdir, "it is no FIFO; remove it"),
        (lambda path: os.mkfifo(path, 0o400), r"its mode is 0400, ours is 0600; remove it|denied"),
    ],
)
def test_a_stranger_of_its_name_is_refused(name, leave, why):
    path = f"/dev/shm{name}"
    leave(path)
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(SegmentError, match=f"^doorbell {name} cannot be opened: .*({why})"):
            Doorbell.open(name)
        assert len(os.listdir("/proc/self/fd")) == descriptors
    finally:
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)


def test_a_folder_of_its_name_is_not_replaced(name):
    os.mkdir(f"/dev/shm{name}")
    try:
        with pytest.raises(SegmentError, match=f"^doorbell {name} cannot be replaced: .*directory"):
            Doorbell.create(name)
    finally:
        os.rmdir(f"/dev/shm{name}")


def test_the_planner_is_not_woken_for_ever_by_a_worker_that_died(name):
    worker = Doorbell.create(name)
    planner = Doorbell.open(name)
    worker.close()
    assert not waits(planner)
    assert planner.drain() == 0
    planner.close()
