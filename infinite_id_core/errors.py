"""Every failure a user can meet, by name. Messages say what was expected, found, and what to do."""

from __future__ import annotations

import reprlib
from pathlib import Path


class InfiniteIDError(Exception):
    """Base of all errors of this project."""


class OptionError(InfiniteIDError, ValueError):
    """An option is outside its allowed values."""


class WrongInputError(InfiniteIDError, TypeError):
    """An input got something of another kind than it takes."""


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100  # characters


def shown(value: object) -> str:
    """``value`` as a message shows it: short, whatever was sent; of an object only its kind."""
    if value is not None and not isinstance(value, (str, int, float, list, tuple, dict)):
        return f"an object of type {type(value).__name__}"
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return f"a very large {type(value).__name__}"


# --- files -----------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text with what no terminal should get (control characters, half letters) spelt out."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


MAX_PROBLEM = 4000  # characters
MAX_PATH = 1000  # characters of it that a message shows


class FileError(InfiniteIDError):
    """A file is not what it should be. The message starts with its path."""

    def __init__(self, path: str | Path, problem: str) -> None:
        if len(problem) > MAX_PROBLEM:  # names and values out of a hostile file can be megabytes
            problem = f"{problem[:MAX_PROBLEM]} [...]"
        problem = printable(problem)  # and can move a terminal's cursor
        super().__init__(f"{str(path)[:MAX_PATH]}: {problem}")
        self.path = Path(path)
        self.problem = problem

    def __reduce__(self) -> tuple[type[FileError], tuple[Path, str]]:
        return type(self), (self.path, self.problem)  # errors cross process borders


class FileMissingError(FileError):
    """The file, or the folder it should be in, does not exist."""


class UnreadableError(FileError):
    """The system refuses to read a file or folder, or has no memory for what it holds."""


class FileChangedError(FileError):
    """The file was written to while it was read."""


class FileTooLargeError(FileError):
    """The file holds more than any sound file of its kind. It was not read."""


class NotSafetensorsError(FileError):
    """The file is a pickle or something else, whatever its name says. It was not opened."""


class TruncatedFileError(FileError):
    """The file ends before its last tensor, or has bytes after it."""


class HeaderTooLargeError(FileError):
    """The header claims to be larger than any real header."""


class HeaderError(FileError):
    """The header is not the JSON a safetensors file starts with."""


class OverlappingOffsetsError(FileError):
    """Two tensors claim the same bytes, or leave a hole between them."""


class WrongFormatError(FileError):
    """A sound safetensors file that is not of the wanted kind."""


class OtherFamilyError(WrongFormatError):
    """A file that is known by name and is no adapter for SDXL that can be used here."""


class NewerVersionError(FileError):
    """Written by a newer version of this project."""


class ConfigError(FileError):
    """The file's configuration has missing, unknown or impossible entries."""


class MissingTensorError(FileError):
    """Tensors the format requires are absent."""


class UnexpectedTensorError(FileError):
    """Tensors the format does not know."""


class WrongShapeError(FileError):
    """A tensor has another shape than the configuration and its neighbours require."""


class WrongDtypeError(FileError):
    """A tensor is not floating point."""


class NotFiniteError(FileError):
    """A tensor holds NaN or infinity."""


class NotWrittenError(FileError):
    """A file could not be written: disk full, no permission. What was there before is unchanged."""


class DiskFullError(NotWrittenError):
    """No room left on the disk. Nothing half-written was kept."""


class NameTakenError(FileError):
    """A file of this name is there already, and was not to be replaced."""


class NameNotAllowedError(InfiniteIDError, ValueError):
    """A file name that is empty, reserved or would leave its folder."""


class UnsafePickleError(FileError):
    """A pickle asks for more than tensors. It was not loaded and nothing of it ran."""


class UnknownFileError(FileError):
    """A file of no kind this project knows."""


class NotConvertibleError(FileError):
    """A pickle of tensors, but not those of an adapter, an identity or a model."""


# --- things that do not fit together ---------------------------------------------------------


class MismatchError(InfiniteIDError):
    """Two inputs do not fit together."""


class IdentityMismatchError(MismatchError):
    """An identity was made with another encoder than the adapter (or the other identity) needs."""


class ModelMismatchError(MismatchError):
    """The adapter was made for a UNet of another shape."""


class FeatureError(InfiniteIDError, ValueError):
    """An identity's features give numbers that are not finite."""


class NotSDXLError(MismatchError):
    """The model is not an SDXL-shaped UNet."""


class NotInstantIDError(MismatchError):
    """An adapter whose tokens InstantID's ControlNet cannot read."""


class NotIdentityNetError(MismatchError):
    """A ControlNet that cannot read tokens as wide as SDXL's."""


class StreamConflictError(MismatchError):
    """Two Apply nodes on one model ask for different things of the one text stream."""


class PatchConflictError(MismatchError):
    """Another node pack replaced the same attention in a way that cannot be composed."""


class AdapterNotCarriedError(MismatchError):
    """A copy of the model, on another GPU, came without its copy of the adapter."""


# --- faces and encoders ----------------------------------------------------------------------


class MissingPackageError(InfiniteIDError, ImportError):
    """A Python package this node needs is not installed."""


class ImageError(InfiniteIDError, ValueError):
    """A picture is empty, has an impossible shape or is too large."""


class UnknownPictureError(ImageError):
    """A file of no picture format that is read, whatever its name says. No decoder saw it."""


class DamagedPictureError(ImageError):
    """A picture's file that cannot be decoded: damaged, cut, or of too many pixels."""

    def __init__(self, problem: str, *, truncated: bool = False, too_large: bool = False) -> None:
        super().__init__(problem)
        self.truncated = truncated
        self.too_large = too_large


class FaceError(InfiniteIDError):
    """Something about faces."""


class NoFaceError(FaceError):
    """No face was found; the message lists what was tried."""


class FaceIndexError(FaceError, IndexError):
    """The wanted face number does not exist."""


class MissingModelsError(InfiniteIDError):
    """Files that an adapter needs are not there; the message names all of them, and where to put
    each."""


class FaceModelError(FaceError):
    """A face model pack is missing, nested, incomplete or has no recogniser."""


class EncoderError(InfiniteIDError):
    """An image encoder is not of a kind this project can use."""
