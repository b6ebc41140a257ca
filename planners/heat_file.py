"""Heat from elsewhere: plain arrays, and the dumps of SGLang's expert distribution recorder."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from .chunk import reason
from .recording import Counts, Recording, RecordingError, sum_episodes

_FORMS = ".npy, .npz or .pt"
_MOST = 2**53  # from there on float64 does not hold every whole number


class HeatFile:
    """Tokens by logical expert from a file; it says nothing of ranks and placements.

    Args:
        path: .npy; .npz with one array [steps, layers, experts], or one of them named as
            `file.npz:name`; .pt with a tensor of that shape or a dump of SGLang. Instead of steps
            it may hold episodes. An array [layers, experts] counts as one step.

    Raises:
        RecordingError: it is not there, is none of these, or holds no counts.

    Attributes:
        layers, experts: of the counts.
    """

    def __init__(self, path: str | Path):
        name, _, member = str(path).partition(".npz:")
        self._path = Path(name + ".npz") if member else Path(path)
        self._heat = _checked(self._path, _read(self._path, member))
        self.layers, self.experts = self._heat.shape[1:]

    def __len__(self) -> int:
        return len(self._heat)

    def counts(self) -> Iterator[Counts]:
        """The steps, oldest first."""
        for heat in self._heat:
            yield Counts(heat.astype(np.int64))

    def episodes(self, steps: int) -> Iterator[np.ndarray]:
        """int64 [layers, experts] of each episode of `steps` steps; the rest is left out."""
        return sum_episodes(self.counts(), steps)


def open_heat(path: str | Path) -> Recording | HeatFile:
    """The recording in a folder, or the counts in a file.

    Raises:
        RecordingError: it is neither.
    """
    return Recording(path) if Path(path).is_dir() else HeatFile(path)


def _read(path: Path, member: str) -> Any:
    readers = {".npy": _from_npy, ".npz": _from_npz, ".pt": _from_pt}
    if not path.exists():
        raise RecordingError(f"{path} is not there; give the folder of EPLB_RECORD or a {_FORMS}")
    if path.suffix not in readers:
        raise RecordingError(f"{path} is neither the folder of a recording nor a {_FORMS} file")
    try:
        return readers[path.suffix](path, member)
    except RecordingError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, RuntimeError) as error:
        raise RecordingError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # unpickling raises whatever it likes
        text = f"{path} cannot be read: {type(error).__name__}: {reason(error)}"
        raise RecordingError(text) from error


def _from_npy(path: Path, _: str) -> Any:
    with open(path, "rb") as raw:  # numpy takes what it does not know for pickled objects
        if raw.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
            raise RecordingError(f"{path} is no .npy file: write it with numpy.save")
    return np.load(path, allow_pickle=False)


def _from_npz(path: Path, member: str) -> Any:
    with open(path, "rb") as raw:
        if not zipfile.is_zipfile(raw):
            raise RecordingError(f"{path} is no .npz file, which is a zip archive; use numpy.savez")
        raw.seek(0)
        return _member(path, member, np.load(raw, allow_pickle=False))


def _member(path: Path, member: str, file: Any) -> np.ndarray:
    if {"header", "placements"} <= set(file.files):  # its heat is that of slots, not of experts
        raise RecordingError(f"{path} is a chunk of a recording; give its folder, {path.parent}")
    names = [member] if member else file.files
    if member and member not in file.files:
        raise RecordingError(f"{path} has no array {member!r}; it has {', '.join(file.files)}")
    if len(names) != 1:
        raise RecordingError(
            f"{path} holds {len(names)} arrays; name one as {path}:NAME "
            f"({', '.join(names) or 'none'})"
        )
    return file[names[0]]


def _from_pt(path: Path, _: str) -> Any:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it advises to run the file's code
        raise RecordingError(
            f"{path} cannot be read: it is no file of torch.save, or holds other objects than "
            "tensors, lists, dictionaries and numbers; save the tensor alone"
        ) from None
    if isinstance(found, dict) and "logical_count" in found:
        found = found["logical_count"]
    elif isinstance(found, dict) and "records" in found:
        return _from_records(path, found)
    if not isinstance(found, torch.Tensor):
        raise RecordingError(
            f"{path} holds a {type(found).__name__}; it must be a tensor, or a dump of SGLang with "
            "logical_count, or with records and last_physical_to_logical_map"
        )
    return found.to(torch.float64).numpy() if found.is_floating_point() else found.numpy()


def _from_records(path: Path, dump: dict) -> np.ndarray:
    """SGLang's per_pass and per_token modes: int64 [passes, layers, experts].

    Each record has the counts of one forward pass by physical expert; the map is that of the end.
    """
    try:
        where = dump["last_physical_to_logical_map"].numpy().astype(np.int64)
        passes: dict[int, np.ndarray] = {}
        for record in dump["records"]:
            counts = record["global_physical_count"].numpy().astype(np.int64)
            number = int(record["forward_pass_id"])
            passes[number] = passes.get(number, 0) + counts
        physical = np.stack([passes[number] for number in sorted(passes)])
        if (
            physical.shape[1:] != where.shape
            or not 0 <= where.min() <= where.max() < where.shape[1]
        ):
            raise ValueError(f"a map {where.shape} does not fit counts {physical.shape}")
        held = np.eye(int(where.max()) + 1, dtype=np.int64)[where]  # [layers, columns, experts]
        return np.einsum("nlp,lpe->nle", physical, held)
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise RecordingError(
            f"{path} is no dump of SGLang that is known here: {type(error).__name__}: "
            f"{reason(error)}; record with --expert-distribution-recorder-mode stat"
        ) from error


def _checked(path: Path, heat: np.ndarray) -> np.ndarray:
    heat = np.asarray(heat)
    if heat.ndim == 2:
        heat = heat[None]
    if heat.ndim != 3 or 0 in heat.shape or heat.dtype.kind not in "iuf":
        raise RecordingError(
            f"{path} holds {heat.dtype} of shape {heat.shape}; it must be counts "
            "[steps, layers, experts]"
        )
    low, high = heat.min().item(), heat.max().item()  # 2**53 is more than float16 holds
    if not (low >= 0 and high < _MOST):  # nan fails both
        raise RecordingError(
            f"{path} holds counts from {low} to {high}; they must be finite, at least 0 and below "
            "2**53"
        )
    if heat.dtype.kind == "f" and not (heat == np.floor(heat)).all():
        raise RecordingError(f"{path} holds shares, not counts; they must be whole")
    return heat
