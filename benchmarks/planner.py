"""`make bench-planner`: our planner against its peers, on one thread, in one process and run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console

from . import cells, figure, heat, longrun, optimum, report, scale, summary
from .cells import Record, Shape
from .peers import REFERENCE, VLLM, single_threaded
from .policies import EFFORTS, GREEDY, Entry, entries
from .targets import FOLDER, Target, not_run, print_targets, write_json, write_targets

SHAPES: tuple[Shape, ...] = (
    (256, 32, 9),
    (256, 64, 5),
    (256, 16, 18),
    (256, 8, 36),
    (128, 16, 9),
    (384, 32, 13),
    (64, 8, 9),
    (64, 16, 5),
    (512, 64, 9),
)
QUICK_SHAPES: tuple[Shape, ...] = ((128, 16, 9), (64, 8, 9))
QUICK_FAMILIES = ("zipf-0.8", "drift", "antiphase", "burst", "trace-decode")
LAYERS = 4  # of a synthetic cell; a recording has at most TRACE_LAYERS, spread over its depth
TRACE_LAYERS = 13
Part = tuple[str, str, Callable[[], list[Target]]]


@dataclass(frozen=True)
class Size:
    """How much of the benchmark runs."""

    repeats: int = 5
    stationary_windows: int = 51
    ranks: int = 1024
    episodes: int = 256
    instances: int = 100


QUICK = Size(repeats=1, stationary_windows=11, ranks=64, episodes=64, instances=10)


@dataclass
class Results:
    """All that is measured, as it goes into `planner-cells.json`."""

    cells: list[Record]
    rolling: list[Record]
    stationary: list[Record]
    whole: Record
    scale: dict[str, list[Record]]
    memory: list[Record]
    optimum: list[Record]


def main() -> None:
    """Measure, print and write; see `--help`."""
    options = _options()
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 150)
    single_threaded()
    started = time.perf_counter()
    found, missing = entries()
    for what in missing:
        console.print(f"[yellow]left out: {what}[/]")
    size = QUICK if options.quick else Size()
    results = Results([], [], [], {}, {}, [], [])
    cases, left_out = _cases(options, console)
    _warm_up(found)
    for number, (shape, name) in enumerate(cases, 1):
        began = time.perf_counter()
        case = _case(name, shape)
        results.cells += cells.measure(found, shape, case, size.repeats)
        results.rolling += _roll(found, shape, case) if case.rolling else []
        _progress(console, f"{number}/{len(cases)}", results.cells[-len(found) :], began)
    targets = [summary.valid_target([*results.cells, *results.rolling])]
    targets += summary.cell_targets(results.cells) + summary.rolling_targets(results.rolling)
    targets += left_out + _rest(found, size, results, console, list(dict(cases)))
    _print(console, results)
    print_targets(targets, "Planner", console)
    suffix = "-quick" if options.quick else ""
    _write(results, targets, suffix, console)
    console.print(f"took {(time.perf_counter() - started) / 60:.1f} minutes")
    if options.json:
        print(json.dumps([asdict(target) for target in targets], indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-planner", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few shapes and families, one repeat")
    parser.add_argument("--shapes", help="experts,ranks,slots; several divided by blanks")
    parser.add_argument("--families", help="names divided by commas, recordings among them")
    parser.add_argument("--json", action="store_true", help="the targets as JSON on stdout")
    return parser.parse_args()


def _cases(
    options: argparse.Namespace, console: Console
) -> tuple[list[tuple[Shape, str]], list[Target]]:
    """Each shape with each family that fits it, and the targets that need what is not there."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    if options.shapes:
        shapes = tuple(_shape(text) for text in options.shapes.split())
    left_out: list[Target] = []
    try:
        recorded = {case.name: case.experts for case in heat.traces()}
    except FileNotFoundError as error:
        why = f"{error.filename} is not there"
        console.print(f"[yellow]left out: the recordings; {why}[/]")
        recorded, left_out = {}, [not_run("rolling on real decode: moves", "<= 0.1", why)]
    known = [*heat.families(), *recorded]
    names = list(QUICK_FAMILIES) if options.quick else known
    if options.families:
        names = options.families.split(",")
    unknown = set(names) - set(known) - set(QUICK_FAMILIES)
    if unknown:
        raise SystemExit(f"no such family: {', '.join(unknown)}; there are {', '.join(known)}")
    fits = [name for name in names if name in known]
    cases = [(s, name) for s in shapes for name in fits if recorded.get(name, s[0]) == s[0]]
    return cases, left_out


def _shape(text: str) -> Shape:
    try:
        experts, ranks, slots = map(int, text.split(","))
    except ValueError:
        raise SystemExit(f"{text} is no shape; write experts,ranks,slots") from None
    if not 0 < slots <= experts <= ranks * slots:
        raise SystemExit(f"{text} is no shape: slots <= experts <= ranks * slots must hold")
    return experts, ranks, slots


def _case(name: str, shape: Shape) -> heat.Case:
    if name in heat.families():
        return heat.synthetic(name, shape[0], LAYERS, seed=0)
    case = next(case for case in heat.traces() if case.name == name)
    every = -(-case.steps.shape[1] // TRACE_LAYERS)
    sizes = (case.episode_steps, case.window, case.rolling)
    return heat.Case(name, case.steps[:, ::every], *sizes)


def _warm_up(found: Sequence[Entry]) -> None:
    """Compile everything once; failures show up again where they are measured."""
    cells.measure(found, (64, 8, 9), heat.synthetic("drift", 64, 1, seed=1), repeats=1)


def _roll(found: Sequence[Entry], shape: Shape, case: heat.Case) -> list[Record]:
    """Ours picking layers, peers planning every layer, and the reference in both ways."""
    records = []
    for entry in found:
        if entry.name not in EFFORTS and entry.name != GREEDY:
            records.append(cells.roll(entry, shape, case, lasting=False))
        if entry.lasting:
            records.append(cells.roll(entry, shape, case, lasting=True))
    return records


def _rest(found, size: Size, results: Results, console: Console, shapes) -> list[Target]:
    """All that is not a cell; what fails is a target that was not run, with why."""
    rows: list[Target] = []
    for name, target, part in _parts(found, size, results, shapes):
        began = time.perf_counter()
        try:
            rows += part()
        except Exception as error:
            rows.append(not_run(name, target, f"{type(error).__name__}: {error}"))
        console.print(f"[dim]{name}: {time.perf_counter() - began:.0f} s[/]")
    return rows


def _parts(found, size: Size, results: Results, shapes) -> list[Part]:
    """Each part's name, its target and what measures it."""
    by_name = {entry.name: entry for entry in found}

    def greedy() -> list[Target]:
        if VLLM not in by_name:
            raise LookupError(f"{VLLM} is not there")
        compared = longrun.greedy_apart(by_name[GREEDY], by_name[VLLM], shapes)
        return summary.greedy_targets(results.cells, *compared)

    def stationary() -> list[Target]:
        for shape in longrun.stationary_shapes(shapes):
            results.stationary += longrun.stationary(shape, size.stationary_windows)
        return [summary.stationary_target(results.stationary)]

    def whole() -> list[Target]:
        results.whole = longrun.whole_plan(by_name.get(REFERENCE), size.repeats)
        return [summary.whole_target(results.whole)]

    def growth() -> list[Target]:
        results.scale["ranks"] = scale.by_ranks(size.repeats, size.ranks)
        results.scale["episodes"] = scale.by_episodes(size.repeats, size.episodes)
        return [summary.scale_target(results.scale["ranks"], size.ranks)]

    def memory() -> list[Target]:
        largest = (1, scale.experts_of(size.ranks), size.ranks)
        results.memory = [scale.peak_memory(*sizes) for sizes in ((58, 256, 32), largest)]
        return [summary.memory_target(record) for record in results.memory]

    def proven() -> list[Target]:
        solved = [optimum.compare(optimum.instance(seed)) for seed in range(size.instances)]
        results.optimum = [asdict(result) for result in solved]
        return optimum.seed_targets() + optimum.optimum_targets(solved)

    return [
        (f"{GREEDY}: PAR against {VLLM}, difference", "<= 0.1", greedy),
        ("stationary Zipf: layers picked after the first plan", "<= 0", stationary),
        ("whole plan: times faster", ">= 10", whole),
        ("growth of the cost with ranks and episodes", "<= 1", growth),
        ("peak memory", "printed", memory),
        ("thorough, gap to the proven optimum", "<= 0.5 mean, 2 worst", proven),
    ]


def _progress(console: Console, number: str, records: Sequence[Record], began: float) -> None:
    shape = ",".join(map(str, records[0]["shape"]))
    parts = []
    for record in records:
        if record["policy"] in (*EFFORTS, REFERENCE):
            parts.append(f"{record['policy']} {_brief(record)}")
    took = time.perf_counter() - began
    line = f"{number} ({shape}) {records[0]['family']}: {'; '.join(parts)} [{took:.1f} s]"
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _brief(record: Record) -> str:
    if record["fault"]:
        return record["fault"][:40]
    return f"{record['ms']:.2f} ms {record['par_train']:.3f}/{record['par_next']:.3f}"


def _print(console: Console, results: Results) -> None:
    report.print_policies(console, results.cells)
    report.print_families(console, results.cells)
    report.print_rolling(console, results.rolling)
    report.print_faults(console, results.cells, results.rolling)
    if results.scale:
        report.print_scale(console, results.scale)


def _write(results: Results, targets: list[Target], suffix: str, console: Console) -> None:
    written = [
        write_targets(targets, f"planner{suffix}"),
        write_json(asdict(results), f"planner-cells{suffix}"),
        FOLDER / f"planner{suffix}.png",
    ]
    figure.draw(results.cells, results.rolling, results.scale, written[-1])
    console.print("written: " + ", ".join(str(path) for path in written), highlight=False)


if __name__ == "__main__":
    main()
