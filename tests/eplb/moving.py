"""Two workers whose experts move, and whose weights an engine writes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_worker import SIZES, Workers

from flash_eplb.eplb.derived import left_behind
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.round import Round, encode_round
from flash_eplb.planners.plan import make_plan

LAYERS, EXPERTS, RANKS, SLOTS = SIZES
GENERATION = 99


class Moving(Workers):
    """Workers with a planner's end of their queues."""

    def __init__(self, session, **options):
        self.scales = [torch.ones(SLOTS), torch.ones(SLOTS)]  # of each rank; nobody hands them out
        configs = [{"staging_rows": 1, **options}] * 2
        super().__init__(session, configs, unsupported=self.left_behind)
        self.step()
        self.initial = self.engines[0].placement
        self.segments = [
            RankSegment.open(rank_name(session, rank), writable=True) for rank in range(2)
        ]
        for segment in self.segments:
            segment.plans.take_over(GENERATION)
        self.sequence = 1
        self.plans = 0

    def left_behind(self, rank):
        layer = SimpleNamespace(scales=self.scales[rank])
        return left_behind(layer, self.engines[rank].weights[0], SLOTS)

    @property
    def placement(self):
        return self.workers[0]._loader.placement

    def send(self, wanted):
        """The rounds of a plan to both ranks, as far as the queues hold them."""
        self.plans += 1
        epoch = self.workers[0].epoch
        rounds = make_plan(self.placement, wanted).rounds(1)
        for number, part in enumerate(rounds):
            record = encode_round(
                Round(
                    GENERATION,
                    self.plans,
                    self.sequence + number,
                    number == len(rounds) - 1,
                    epoch + number,
                    LAYERS,
                    RANKS,
                    SLOTS,
                    part.moves.tobytes(),
                )
            )
            for segment in self.segments:
                segment.plans.put(record)
        self.sequence += len(rounds)

    def move(self):
        """Reverse the ranks of layer 1, and wait for it."""
        wanted = self.placement.copy()
        wanted[1] = wanted[1, ::-1]
        self.send(wanted)
        self.step_until(lambda: {*self.placement[1, 0]} == {*wanted[1, 0]})

    def step_until(self, done):
        for _ in range(2000):
            if done():
                return
            self.step()
        raise AssertionError("not reached")

    def write(self, rank):
        """What an engine's loader does: new weights, by the initial placement."""
        engine = self.engines[rank]
        for layer, (wide, narrow) in enumerate(engine.weights):
            ids = torch.from_numpy(EXPERTS - 1 - self.initial[layer, rank].astype(np.float32))
            wide.copy_((ids * 1000 + layer)[:, None] + torch.arange(37) / 64)
            narrow.copy_((wide[:, :5] * 3).to(torch.bfloat16))

    def update(self):
        def one(rank):
            self.workers[rank].begin_update()
            self.write(rank)
            self.workers[rank].end_update()

        self.run(one)

    def update_after(self, steps):
        """Experts are at home after an update that comes so many steps later, and move again."""
        self.step(steps)
        self.update()
        assert np.array_equal(self.placement, self.initial)
        self.step(20)
        self.move()
        self.check(is_new=True)

    def check(self, is_new):
        """Every slot holds what the placement names, and the tables follow."""
        for rank, engine in enumerate(self.engines):
            held = engine.experts_in_slots()
            placed = self.placement[:, rank]
            assert np.array_equal(held, EXPERTS - 1 - placed if is_new else placed)
            assert np.array_equal(engine.routed, self.placement)
            assert self.workers[rank].epoch == self.workers[0].epoch


def error_of(action) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""
