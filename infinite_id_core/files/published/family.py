"""What all published families share: from the names and shapes of a file to an adapter."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import MissingTensorError, UnexpectedTensorError, WrongShapeError
from ...method.adapter import Adapter, MakeProjector, assembled
from ...method.projectors import Projector
from ...method.records import AdapterDescription, PublishedRecord
from ...sdxl.published_layers import SDXL_LAYERS
from ..adapter_options import AdapterOptions
from ..checked import Shapes, check_shapes, check_sizes, shapes_of
from ..safetensors_file import Header
from ..tensor_file import TensorFile
from .attention import attention_names, check_attention, check_generation
from .parts import Parts, parts_of
from .refusals import refusal

_MAX_SIZE = 2**17  # of one dimension; PuLID's largest is 10240, portrait's 32768
_MAX_DEPTH = 64
HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Found:
    """A projector's tensors, and what is around them."""

    file: TensorFile
    parts: Parts
    shapes: Shapes
    """Of the projector's tensors, by the names within it."""
    context_width: int
    low_rank: bool
    """Whether a LoRA is with it."""

    @property
    def path(self) -> Path:
        """The file's."""
        return self.file.path

    def size(self, name: str, axis: int, dimensions: int = 2) -> int:
        """One dimension of a tensor. Raises ``MissingTensorError``, ``WrongShapeError``."""
        shape = self.shapes.get(name)
        if shape is None:
            raise MissingTensorError(self.path, f"lacks {self.parts.prefix}{name}.")
        if len(shape) != dimensions or not all(1 <= n <= _MAX_SIZE for n in shape):
            raise WrongShapeError(
                self.path, f"{self.parts.prefix}{name} has shape {list(shape)}; expected "
                f"{dimensions} dimensions of 1 to {_MAX_SIZE}."
            )  # fmt: skip
        return shape[axis]

    def multiple(self, name: str, of: int, what: str) -> int:
        """How many times ``of`` the rows of a tensor are. Raises as ``size``."""
        rows = self.size(name, 0)
        if rows % of:
            raise WrongShapeError(
                self.path, f"{self.parts.prefix}{name} has {rows} rows; expected a multiple of "
                f"{of}: {what}."
            )  # fmt: skip
        return rows // of

    def depth(self, prefix: str) -> int:
        """Number of a perceiver's layers. Raises ``MissingTensorError``, or
        ``UnexpectedTensorError`` where there are more than in any perceiver."""
        pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.", re.ASCII)
        numbers = {m[1] for m in map(pattern.match, self.shapes) if m}
        if not numbers:
            raise MissingTensorError(self.path, f"lacks {self.parts.prefix}{prefix}*.")
        if len(numbers) > _MAX_DEPTH:
            raise UnexpectedTensorError(
                self.path, f"has {len(numbers)} layers {self.parts.prefix}{prefix}*; expected at "
                f"most {_MAX_DEPTH}."
            )  # fmt: skip
        return len(numbers)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a file's adapter is built."""

    make_projector: MakeProjector
    record: PublishedRecord


class PublishedFormat(ABC):
    """A family of published adapters; see ``AdapterFormat``."""

    family: str

    @abstractmethod
    def matches(self, shapes: Shapes) -> bool:
        """Whether these are a projector of this family, by names within it and widths; families
        are asked in an order (``families.py``)."""

    @abstractmethod
    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        """What the shapes say. Raises ``MissingTensorError``, ``WrongShapeError``, ..."""

    def recognises(self, header: Header) -> bool:
        """By the projector's tensors."""
        parts = parts_of(header.tensors)
        known = bool(parts.projector) and self.matches(parts.shapes(header))
        return known and refusal(header, parts) is None

    def describe(
        self, file: TensorFile, options: AdapterOptions | None = None
    ) -> AdapterDescription:
        """What it is, by its header alone. Raises as ``build``, but for what tensors hold."""
        _, plan, projector = self._planned(file, options or AdapterOptions())
        return AdapterDescription(record=plan.record, needs=projector.needs)

    def build(
        self, file: TensorFile, operations: Any = torch.nn, options: AdapterOptions | None = None
    ) -> Adapter:
        """An adapter that holds the file's tensors. Raises subclasses of ``FileError``."""
        names, plan, _ = self._planned(file, options or AdapterOptions())
        tensors = {ours: file.tensor(own) for ours, own in names.items()}
        return assembled(plan.record, plan.make_projector, tensors, operations)

    def tensor_names(self, file: TensorFile, options: AdapterOptions) -> dict[str, str]:
        """The file's own name of each tensor by the name in an adapter's ``state_dict``. Raises as
        ``describe``."""
        return self._planned(file, options)[0]

    def _planned(
        self, file: TensorFile, options: AdapterOptions
    ) -> tuple[dict[str, str], Plan, Projector]:
        """Our name of each tensor with the file's own, checked; the plan; its empty projector."""
        parts, shapes = parts_of(file.header.tensors), shapes_of(file.header)
        layers = options.layers or SDXL_LAYERS
        if options.layers is None:
            check_generation(file.path, parts.attention, shapes)
        names = attention_names(file.path, parts.attention, layers)
        check_attention(file.path, names, shapes, layers)
        names |= {f"image_proj.{name}": own for name, own in parts.projector.items()}
        check_sizes(file, names.values())
        found = Found(
            file=file,
            parts=parts,
            shapes=parts.shapes(file.header),
            context_width=layers[0].context_width,
            low_rank=any(name.startswith("low_rank.") for name in names),
        )
        plan = self.plan(found, options)
        return names, plan, _checked_projector(found, plan)


def _checked_projector(found: Found, plan: Plan) -> Projector:
    """The plan's projector, without numbers. Raises where the file's differs in any tensor."""
    with torch.device("meta"):
        projector = plan.make_projector(torch.nn)
    prefix, own = found.parts.prefix, found.parts.projector
    wanted = {
        name.removeprefix("image_proj."): tuple(tensor.shape)
        for name, tensor in projector.state_dict().items()
    }
    # In the names of the file, which the reader of a message can look for.
    check_shapes(
        found.path,
        {own[name]: shape for name, shape in found.shapes.items()},
        {own.get(name, prefix + name): shape for name, shape in wanted.items()},
    )
    return projector


def others_of(found: Found) -> tuple[str, ...]:
    """What of the file was left out, for the record."""
    return tuple(f"{group} ({count} tensors)" for group, count in found.parts.others.items())
