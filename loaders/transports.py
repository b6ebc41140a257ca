"""Which transport a group uses: chosen by what is there, or by `EPLB_TRANSPORT`."""

from __future__ import annotations

import torch.distributed as dist

from .cuda_ipc import CudaIpc
from .engine import Engine
from .staging import first_tensor
from .transport import EngineCommunicator, PeerToPeer, Transport

_DEVICES = {"nccl": "cuda", "ipc": "cuda", "hccl": "npu"}


def choose_transport(wanted: str, device: str, communicator: str, reached: bool) -> str:
    """One of "gloo", "nccl", "hccl", "ipc" and "engine".

    By itself: gloo on the CPU, HCCL on Ascend, and on CUDA the engine's communicator if it reads
    memory from afar (nixl), else CUDA IPC, which falls back to gloo by way of the host where a rank
    cannot open the others' memory. NCCL beside the engine's own collectives has hung others, so it
    is used only when it is asked for.

    Args:
        wanted: `EPLB_TRANSPORT`.
        device: type of the device that the experts lie on.
        communicator: name of the engine's own communicator, "" if it has none.
        reached: whether all staging rows lie in the buffer of the communicator, the only memory
            that nixl may write to.

    Raises:
        ValueError: the one that is wanted cannot serve here.
    """
    is_nixl = "nixl" in communicator.lower()
    if wanted == "auto":
        if device == "cuda" and reached and is_nixl:
            return "engine"
        return {"npu": "hccl", "cuda": "ipc"}.get(device, "gloo")
    if wanted == "engine" and not communicator:
        raise ValueError(
            "EPLB_TRANSPORT=engine: this engine has no communicator of its own; use auto"
        )
    if wanted == "engine" and device == "cpu" and "Staged" in communicator:
        raise ValueError(
            f"EPLB_TRANSPORT=engine: {communicator} of this engine needs an accelerator; use auto, "
            'or let vLLM take another (--eplb-config \'{"communicator": "torch_nccl", '
            '"use_async": false}\')'
        )
    if wanted == "engine" and is_nixl and not reached:
        raise ValueError(
            f"EPLB_TRANSPORT=engine: {communicator} writes only to the expert buffer that vLLM has "
            "made for each model, where not all staging rows lie (a drafter has another buffer); "
            "use auto, or without a drafter lower EPLB_STAGING_ROWS"
        )
    if _DEVICES.get(wanted, device) != device:
        raise ValueError(
            f"EPLB_TRANSPORT={wanted}: it moves what lies on {_DEVICES[wanted]} devices, the "
            f"experts lie on {device}; use auto"
        )
    return wanted


def communicator_name(engine: Engine) -> str:
    """Class of the engine's own communicator, "" if it has none."""
    return type(engine.communicators[0][0]).__name__ if engine.communicators else ""


def transport_for(wanted: str, engine: Engine, rows: int, borrowed: int) -> str:
    """`choose_transport` for `engine`, of whose buffer `borrowed` of the staging `rows` are.

    With a drafter each model has a communicator of its own, which knows its own buffer only.
    """
    device = first_tensor(engine.weights).device.type
    reached = rows == borrowed and len({id(one) for one, _ in engine.communicators}) == 1
    return choose_transport(wanted, device, communicator_name(engine), reached)


def make_transport(
    kind: str, engine: Engine, store: dist.Store, rank: int, ranks: int, timeout: float
) -> Transport:
    """The transport that `choose_transport` named; the arguments are those of `PeerToPeer`."""
    if kind not in ("engine", "ipc"):
        return PeerToPeer(kind, store, rank, ranks, timeout)
    fallback = PeerToPeer("gloo", store, rank, ranks, timeout)
    if kind == "ipc":
        return CudaIpc(engine.weights, store, rank, ranks, timeout, fallback)
    slots = engine.placement.shape[2]
    return EngineCommunicator(
        communicator_name(engine), engine.communicators, ranks, slots, fallback
    )
