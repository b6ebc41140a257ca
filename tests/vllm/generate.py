"""Run `LLM.generate` on batches of prompts; a script, because vLLM wants a process of its own.

Usage: generate.py CHECKPOINT BATCHES.json RESULT.json LEAST_COMMITS RELOAD [ENGINE_ARGUMENTS.json]

Repeats the batches until LEAST_COMMITS rounds are committed (at most eight passes); if RELOAD is 1,
reloads the weights and repeats them until as many are committed again; and writes
{"passes": [[[token ids]]], "commits": rounds, "reloaded": [passes and commits before the reload],
"flags": those of the latest steps' heat, "checksums": [those of each rank's expert tensors, after
the latest load and at the end]}.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams

from flash_eplb.eplb.config import load_config
from flash_eplb.eplb.demo.server import ENGINE


def wait_for_planner(session: str) -> None:
    """Idle until a planner serves: beside two busy ranks on two cores it starts slowly."""
    from flash_eplb.ipc.liveness import owner_is_alive
    from flash_eplb.ipc.names import planner_name

    deadline = time.monotonic() + 60
    while not owner_is_alive(planner_name(session)) and time.monotonic() < deadline:
        time.sleep(0.1)


def main() -> None:
    checkpoint, work_file, result_file, least, reload = sys.argv[1:6]
    more = json.loads(sys.argv[6]) if len(sys.argv) > 6 else {}
    with open(work_file) as file:
        work = json.load(file)
    llm = LLM(model=checkpoint, distributed_executor_backend="mp", **{**ENGINE, **more})
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    # Not at the top: vLLM's workers import this script, and must not import numba so early.
    from flash_eplb.eplb.demo.observer import Observer

    observer = Observer(load_config().session)
    passes = []

    def run(most: int, least: int) -> None:
        """Up to `most` passes, until `least` rounds are committed."""
        for _ in range(most):
            answers = []
            for batch in work:
                prompts = [{"prompt_token_ids": prompt} for prompt in batch]
                outputs = llm.generate(prompts, sampling, use_tqdm=False)
                answers.append([list(output.outputs[0].token_ids) for output in outputs])
                llm.collective_rpc("execute_dummy_batch")  # as an idle rank of a DP group does
            passes.append(answers)
            if observer.commits() >= least:
                break
            wait_for_planner(load_config().session)

    def checksums() -> list[dict[str, str]]:
        """Of each rank: vLLM's digests of its expert tensors by name."""
        return [
            {name: digest for name, digest in theirs.items() if "experts" in name}
            for theirs in llm.collective_rpc("compute_weight_checksums")
        ]

    first = checksums()
    run(8, int(least))
    reloaded = [len(passes), observer.commits()]
    if int(reload):
        llm.collective_rpc("reload_weights")
        first = checksums()  # vLLM's CPU build itself lays weights out in another way now
        run(8, observer.commits() + int(least))
    last = checksums()
    rings = observer.group.ranks if observer.group is not None else []
    for rank in rings:
        rank.heat.follow()
    flags = sorted({int(flag) for rank in rings for flag in rank.heat.read(256).flags})
    result = {
        "passes": passes,
        "commits": observer.commits(),
        "reloaded": reloaded,
        "flags": flags,
        "checksums": [first, last],
    }
    observer.close()
    with open(result_file, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
