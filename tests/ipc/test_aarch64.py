"""What LLVM makes of the kernels for aarch64, whose memory order is weak.

Each kernel is compiled for that target, and all paths through its assembly are followed: at every
protocol point the instruction that orders memory must come, and no other access in between.
"""

import functools
import importlib
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest
from llvmlite import binding
from numba import int16, int32, int64, njit, types
from numba.core.registry import CPUDispatcher

from flash_eplb import ipc
from flash_eplb.ipc import atomics, ballot_box, heat_ring, status

INTRINSICS = {
    "_load_acquire",
    "_store_release",
    "_compare_and_swap",
    "fence_acquire",
    "fence_release",
}
OPERATIONS = INTRINSICS | {"load_acquire", "store_release", "copy_in", "copy_out"}

WORDS, CELLS = int64[::1], int16[:, :, ::1]
SEEN_WORDS = types.Array(int64, 1, "C", readonly=True)

# state: {event: next state}; an event that is not named there must not happen in that state.
LOAD = {"start": {"acquire": "read"}, "read": {"return": "end"}}
STORE = {"start": {"release": "written"}, "written": {"return": "end"}}
BOARD_WRITER = {
    "start": {"release": "odd"},
    "odd": {"fence": "open"},
    "open": {"store": "open", "release": "even"},
    "even": {"return": "end"},
}
RING_WRITER = BOARD_WRITER | {"even": {"release": "shown"}, "shown": {"return": "end"}}
BOARD_READER = {
    "start": {"acquire": "copying"},
    "copying": {"load": "copying", "fence": "copied"},
    "copied": {"acquire": "proved"},
    "proved": {"return": "end"},
}
RING_READER = {
    "start": {"acquire": "next"},
    "next": {"acquire": "looked", "return": "end"},
    "looked": {"load": "copying", "acquire": "looked", "return": "end"},
    "copying": {"load": "copying", "fence": "copied"},
    "copied": {"acquire": "next"},
}

BOX_WRITER = {
    "start": {"store": "start", "release": "cast"},
    "cast": {"return": "end"},
}
BOX_READER = {
    "start": {"acquire": "looked", "swap": "settled"},
    "looked": {"load": "copying", "acquire": "looked", "swap": "settled", "return": "end"},
    "copying": {"load": "copying", "acquire": "looked", "swap": "settled"},
    "settled": {"swap": "settled", "return": "end"},
}
SETTLER = {"start": {"swap": "settled"}, "settled": {"swap": "settled", "return": "end"}}

KERNELS = {
    atomics.load_acquire: (LOAD, (SEEN_WORDS, int64)),
    atomics.store_release: (STORE, (WORDS, int64, int64)),
    ballot_box._cast: (BOX_WRITER, (WORDS, int64, int64, WORDS)),
    ballot_box._settle: (SETTLER, (WORDS, int64, int64, int64)),
    ballot_box._tally: (BOX_READER, (WORDS, int64, int64, WORDS)),
    heat_ring._push: (RING_WRITER, (WORDS, *[int64] * 8, int32[:, ::1])),
    heat_ring._read: (
        RING_READER,
        (SEEN_WORDS, int64, int64, int64, int64[:, ::1], int32[:, :, ::1]),
    ),
    status._write_board: (BOARD_WRITER, (WORDS, int64, CELLS)),
    status._read_board: (BOARD_READER, (SEEN_WORDS, CELLS)),
}
WRITERS = (STORE, BOARD_WRITER, RING_WRITER, BOX_WRITER)

INSTRUCTIONS = (
    ("acquire", r"ldap?u?r\b"),
    ("release", r"stlu?r\b"),
    ("swap", r"casal\b|ldaxr\b|stlxr\b"),  # one instruction, or two in a loop
    ("fence", r"dmb\s+ish(ld)?$"),
    ("copy", r"bl\s+mem(cpy|move)$"),
    ("return", r"ret$"),
    ("raise", r"mov\s+w0, #1$"),
    ("load", r"ld(?!.*\[sp|.*:lo12:)"),
    ("store", r"st(?!.*\[sp|r\s+xzr, )"),  # storing xzr is returning None
)


@functools.cache
def host_code(kernel):
    """Optimized LLVM code, as numba makes it for the host; its reference counting left out."""
    function = njit(kernel.py_func)
    function.compile(KERNELS[kernel][1])
    (text,) = function.inspect_llvm().values()
    return re.sub(
        r"define [^\n]*@NRT_decref\(.*?\n}", "declare void @NRT_decref(ptr)", text, flags=re.S
    )


@functools.cache
def aarch64_code(kernel, cpu):
    """(LLVM code, assembly lines) of the kernel alone, optimized for `cpu`."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu=cpu, opt=3)
    module = binding.parse_assembly(host_code(kernel))
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    name = next(f.name for f in module.functions if f.name.startswith("_ZN10flash_eplb"))
    for function in module.functions:
        if not function.is_declaration and function.name != name:
            function.linkage = "internal"
    builder = binding.create_pass_builder(
        machine, binding.create_pipeline_tuning_options(speed_level=3)
    )
    builder.getModulePassManager().run(module, builder)
    (code,) = [str(f) for f in module.functions if f.name == name]
    assembly = machine.emit_assembly(module)
    start = assembly.index(f"\n{name}:")
    body = assembly[start : assembly.index(".Lfunc_end0", start)].splitlines()[2:]
    lines = [line.split("//")[0].strip() for line in body if not line.startswith("\t.")]
    return code, with_stack_named(lines)


def with_stack_named(lines):
    """`lines`, with sp for a register that holds the address of the stack.

    Beside scalable vectors, of which there are some where the host's vectors are wide, arguments
    are read so: `addvl x8, sp, #2`, then `ldr x9, [x8, #248]`.
    """
    named, stack = [], set()
    for line in lines:
        named.append(re.sub(r"\[(x\d+)", lambda m: "[sp" if m[1] in stack else m[0], line))
        written = re.match(r"(?!st|cmp|cbn?z|tbn?z)\w+\s+(x\d+)", line)
        if line.endswith(":"):
            stack.clear()
        elif re.match(r"addvl\s+x\d+, sp", line):
            stack.add(written[1])
        elif written:
            stack.discard(written[1])
    return named


def event(line, writes):
    """What happens at an instruction, as far as the one that writes or reads is concerned."""
    for name, pattern in INSTRUCTIONS:
        if re.match(pattern, line):
            if name == "copy":
                return "store" if writes else "load"
            if name == "fence" and writes and line.endswith("ld"):
                return None
            return None if name == ("load" if writes else "store") else name
    return None


def follow(lines, protocol, writes):
    """Follow every path that does not raise; returns the states that were reached."""
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    seen = set()
    waiting = [(0, "start")]
    while waiting:
        number, state = place = waiting.pop()
        if place in seen or state == "end":
            seen.add(place)
            continue
        seen.add(place)
        line = lines[number]
        happens = event(line, writes)
        if happens == "raise":
            continue
        if happens:
            assert happens in protocol[state], f"{happens} in state {state!r}: {line}"
            state = protocol[state][happens]
        jump = re.match(r"(b|br|b\.\w+|cbn?z|tbn?z)\s.*?([^\s,]+)$", line)
        if jump:
            assert jump[2] in labels, f"a jump that is not followed: {line}"
            waiting.append((labels[jump[2]], state))
        if not (jump and jump[1] == "b"):
            waiting.append((number + 1, state))
    return {state for _, state in seen}


def addresses(code, pattern):
    """What the accesses that fit `pattern` (its group 1 is a pointer) point to.

    An address is a pointer, indices times their size, and a number of bytes; what numba adds to an
    index that may count from the end of the array (array size or 0) is left out.
    """
    made = {
        name: (base, int(bits) // 8, index)
        for name, bits, base, index in re.findall(
            r"(%\S+) = getelementptr [a-z ]*i(\d+), ptr (%[^\s,]+), i64 (\S+)$", code, re.M
        )
    }
    from_end = set(re.findall(r"(%\S+) = select i1 \S+, i64 %arg\.\w+\.5\.0, i64 0$", code, re.M))

    def terms(pointer):
        if pointer not in made:
            return Counter({pointer: 1, "bytes": 0})
        base, size, index = made[pointer]
        if index in from_end:
            return terms(base)
        number = re.fullmatch(r"-?\d+", index)
        total = terms(base)
        total["bytes" if number else index] += size * int(index) if number else size
        return total

    return {frozenset(terms(pointer).items()) for pointer in re.findall(pattern, code)}


def kernels_that_order_memory():
    """Every kernel of the package that uses one of the operations."""
    for found in pkgutil.iter_modules(ipc.__path__, "flash_eplb.ipc."):
        module = importlib.import_module(found.name)
        for kernel in vars(module).values():
            if not isinstance(kernel, CPUDispatcher) or kernel.py_func.__module__ != found.name:
                continue
            if OPERATIONS & set(kernel.py_func.__code__.co_names):
                yield kernel


def test_every_kernel_that_orders_memory_is_looked_at_here():
    assert set(kernels_that_order_memory()) == set(KERNELS)


def test_nothing_outside_ipc_orders_memory_in_a_kernel_of_its_own():
    root = Path(ipc.__file__).parents[1]
    for folder in ("collectors", "eplb", "loaders", "planners"):
        for file in (root / folder).rglob("*.py"):
            assert not INTRINSICS & set(re.findall(r"\w+", file.read_text())), file


@pytest.mark.parametrize("cpu", ["generic", "neoverse-n1", "neoverse-v2"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.py_func.__name__)
def test_memory_is_ordered_at_each_protocol_point_on_every_path(kernel, cpu):
    protocol = KERNELS[kernel][0]
    _, lines = aarch64_code(kernel, cpu)
    assert follow(lines, protocol, protocol in WRITERS) == {*protocol, "end"}


@pytest.mark.parametrize(
    ("cpu", "found"), [("generic", {"ldaxr", "stlxr"}), ("neoverse-n1", {"casal"})]
)
@pytest.mark.parametrize("kernel", [ballot_box._settle, ballot_box._tally])
def test_a_vote_is_settled_by_a_swap_that_orders_memory_both_ways(kernel, cpu, found):
    _, lines = aarch64_code(kernel, cpu)
    exclusive = r"(casp?\w*|ld\w*xr|st\w*xr|swp\w*)\b"
    assert {line.split()[0] for line in lines if re.match(exclusive, line)} == found


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.py_func.__name__)
def test_a_word_that_orders_memory_is_never_accessed_plainly(kernel):
    code, _ = aarch64_code(kernel, "generic")
    ordered = addresses(code, r"(?:load atomic|store atomic|cmpxchg) .*?ptr (%[^\s,]+)")
    assert ordered
    assert not ordered & addresses(code, r"store (?!atomic).*ptr (%[^\s,]+)")
    if KERNELS[kernel][0] not in WRITERS:  # who writes may look at its own word
        assert not ordered & addresses(code, r"load (?!atomic).*ptr (%[^\s,]+)")
