"""What can go wrong while data is prepared and weights are made, by name."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infinite_id_core.errors import DiskFullError as DiskFullError
from infinite_id_core.errors import FileError, InfiniteIDError, OptionError
from infinite_id_core.errors import NotConvertibleError as NotConvertibleError
from infinite_id_core.errors import UnknownFileError as UnknownFileError
from infinite_id_core.errors import UnreadableError as UnreadableError
from infinite_id_core.errors import UnsafePickleError as UnsafePickleError

# --- data ------------------------------------------------------------------------------------


class DataError(InfiniteIDError):
    """Something about the training data."""


class InputKindError(DataError):
    """The input is none of: a folder per person, a heap of photos, WebDataset shards."""


class NoFacesError(DataError):
    """Not one photo has a usable face; the message counts why each was left out."""


class NoPairsError(DataError):
    """No person has two usable photos; the message counts what is missing."""


class FilterError(DataError):
    """The filters leave nothing to train on; the message says which one removed how much."""


class TooFewPeopleError(DataError):
    """Fewer people are held out than validation asks for; the message counts them."""


class DatasetError(FileError):
    """A folder is not a finished, sound dataset of this project."""


class ShardDamagedError(FileError):
    """A shard does not hold what the index says it holds."""


class BusyError(FileError):
    """Another process is writing to the same folder."""


class EngineError(InfiniteIDError):
    """The engine lost a worker; finished parts are kept and the same command goes on."""


# --- evaluation ------------------------------------------------------------------------------


class ManifestError(FileError):
    """A manifest of pictures lacks columns or rows, or is neither CSV nor JSON lines."""


class MissingPicturesError(FileError):
    """Files a manifest names are not there; the message counts and lists them."""


class NoPicturesError(DataError):
    """Nothing to score: no picture was given, or none can be read."""


class ReferencePhotoError(FileError):
    """A reference photo cannot be read, so nothing can be compared with it."""


class UnknownBackboneError(OptionError):
    """A recogniser, detector or CLIP model of no kind this project knows."""


class MethodError(OptionError):
    """A method's description that is not NAME or NAME:key=value,..."""


class PromptSetError(FileError):
    """A prompt set that does not exist, is empty, or has a line that is no prompt."""


# --- training --------------------------------------------------------------------------------


class ConfigSyntaxError(InfiniteIDError, ValueError):
    """A configuration that is not TOML, or an override that is not section.key=value."""


class UnknownKeyError(OptionError):
    """A section or key that does not exist; the message names the nearest one that does."""


class ConfigValueError(OptionError):
    """A configuration value of the wrong kind, outside its range, or at odds with another."""


class ResumeError(InfiniteIDError):
    """A checkpoint cannot be resumed: not whole, or of a run with other settings."""


class NonFiniteError(InfiniteIDError):
    """A loss or gradient norm that is not a number; no step was made. Names the samples."""


class NotCachedError(InfiniteIDError):
    """A frozen model gave NaN or infinity for a photo or a caption, and nothing of it was kept."""


class RankLostError(InfiniteIDError):
    """Another process of this run is gone."""


class WorkerDiedError(InfiniteIDError):
    """A process that reads samples was ended by the system; the message says what to set."""


class TrackerError(InfiniteIDError):
    """A tracker of the run's numbers cannot start."""


class MemoryFullError(InfiniteIDError):
    """The accelerator's or the computer's memory was full; the message says what needs less."""


_FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())

_FULL_WORDS = ("No space left", "File too large", "Disk quota exceeded", "not enough space")


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn the system's "no space left" into ``DiskFullError`` with the path.

    Also where a library has its own error for it: Arrow an ``OSError`` without errno, safetensors
    its ``SafetensorError``, torch a ``RuntimeError``, each with the system's words.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _is_full(error):
            raise
        raise DiskFullError(
            path,
            "the disk is full; nothing half-written was kept. Free some space and run the "
            "same command again: finished parts are not done twice.",
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is the system's "no space left"."""
    while error is not None:
        known = isinstance(error, OSError) and error.errno in _FULL
        if known or any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
