"""Options of ``prepare``: what changes the result, and what only changes how it is made."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from infinite_id_core.errors import OptionError

Kind = Literal["auto", "folders", "heap", "webdataset"]
EngineName = Literal["local", "ray"]
FaceChoice = Literal["largest", "all"]
FACE_CHOICES: tuple[FaceChoice, ...] = get_args(FaceChoice)
KINDS: tuple[Kind, ...] = get_args(Kind)
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What changes the result. Raises ``OptionError`` for impossible values."""

    kind: Kind = "auto"
    """How the input is laid out; ``auto`` looks."""
    identity_field: str = ""
    """WebDataset: the JSON entry that names the person; empty groups the photos by face."""
    licence: str = ""
    """Licence of photos that come without one."""
    detector_size: int = 640
    """Side of the detector's square input, pixels."""
    min_detection: float = 0.5
    """The detector's confidence from which a face counts."""
    faces: FaceChoice = "largest"
    """Which faces of a photo are used: one (the largest; in a person's folder the one most like
    the person), or each for its own person."""
    max_side: int = 2048
    """Photos with a longer side are re-encoded once at this side, pixels."""
    max_pixels: int = 100_000_000
    """Photos that would decode to more pixels are skipped unread."""
    max_bytes: int = 256 * 2**20
    """Files larger than this are skipped unread."""
    neighbours: int = 32
    """Grouping: nearest neighbours looked at per face."""
    link_cosine: float = 0.6
    """Grouping: two faces at least this alike are linked."""
    purify_cosine: float = 0.5
    """Photos less like their person's centroid are left out; -1 keeps all."""
    duplicate_bits: int = 4
    """Near-duplicates differ in at most this many of the 64 bits of the picture hash; -1: off."""
    duplicate_cosine: float = 0.9
    """... and their faces are at least this alike."""
    min_photos: int = 2
    """A person with fewer photos is left out: reference and target are two photos."""
    held_out: float = 0.05
    """Share of people kept out of training, chosen by a hash of the name."""
    seed: int = 0
    """Another seed holds out other people."""
    shard_bytes: int = 512 * 2**20
    """A shard is closed at the person after this size."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"kind must be one of {KINDS}, got {self.kind!r}.")
        if self.faces not in FACE_CHOICES:
            raise OptionError(f"faces must be one of {FACE_CHOICES}, got {self.faces!r}.")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise OptionError(f"{name} must lie in [{low}, {high}], got {value!r}.")
        if self.detector_size % 32:
            raise OptionError(
                f"detector_size must be a multiple of 32 (the detector's coarsest stride), got "
                f"{self.detector_size}."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values, recorded with the dataset."""
        return asdict(self)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("detector_size", 32, 4096),
    ("min_detection", 0.01, 1),
    ("max_side", 64, 65535),
    ("max_pixels", 4096, 2**31),
    ("max_bytes", 1024, 2**31),
    ("neighbours", 1, 2048),
    ("link_cosine", -1, 1),
    ("purify_cosine", -1, 1),
    ("duplicate_bits", -1, 64),
    ("duplicate_cosine", -1, 1),
    ("min_photos", 1, 1 << 20),
    ("held_out", 0, 1),
    ("shard_bytes", 1024, 2**40),
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the result is made; never changes it."""

    engine: EngineName = "local"
    workers: int = 0
    """Processes (local) or actors (Ray); 0: one per two cores (local), one per GPU or two cores."""
    threads: int = 0
    """Threads of each worker's models; 0: cores / workers."""
    gpus_per_worker: float = 0.0
    """Ray: GPUs reserved for each actor."""
    provider: str = "auto"
    """ONNX Runtime provider: ``auto``, ``cpu``, ``cuda``, ``rocm``, ``coreml``, ``directml``."""
    ray_address: str = ""
    """Ray: the cluster's address; empty starts Ray on this machine, or takes RAY_ADDRESS."""
    report: bool = True
    """Write ``report.html``."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise OptionError(f"engine must be one of {ENGINES}, got {self.engine!r}.")
        if self.workers < 0 or self.threads < 0 or self.gpus_per_worker < 0:
            raise OptionError("workers, threads and gpus_per_worker cannot be negative.")

    @property
    def worker_count(self) -> int:
        """``workers`` with the default filled in."""
        return self.workers or max(1, (os.cpu_count() or 2) // 2)

    @property
    def thread_count(self) -> int:
        """``threads`` with the default filled in."""
        return self.threads or max(1, (os.cpu_count() or 1) // self.worker_count)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are."""

    source: Path
    """The input folder (or one shard)."""
    output: Path
    """The dataset's folder."""
    face_models: Path
    """insightface pack: a folder of ONNX files."""

    @property
    def work(self) -> Path:
        """Outputs of the stages; may be deleted once the dataset is finished."""
        return self.output / "work"
