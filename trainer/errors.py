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


class RankLostError(InfiniteIDError):
    """Another process of this run is gone."""


_FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn the system's "no space left" into ``DiskFullError`` with the path."""
    try:
        yield
    except OSError as error:
        # Arrow reports a full disk as an OSError without errno on some systems.
        if error.errno in _FULL or "No space left" in str(error):
            raise DiskFullError(
                path,
                "the disk is full; nothing half-written was kept. Free some space and run the "
                "same command again: finished parts are not done twice.",
            ) from error
        raise
