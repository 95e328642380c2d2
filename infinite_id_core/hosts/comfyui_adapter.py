"""An adapter under ComfyUI's memory management, on one device or on several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher

from ..errors import AdapterNotCarriedError
from ..files.adapter_options import AdapterOptions
from ..files.adapters import read_adapter
from ..method.adapter import Adapter
from ..method.low_rank import LowRankUse
from ..method.placement import IdentityPlacement
from .comfyui_others import Options

KEY = "infinite_id"
"""Of all that is ours in a model: wrappers, carried adapters, the run in its options."""


class LoadedAdapter:
    """An adapter whose weights live under ComfyUI's memory management.

    A model on another GPU carries a module of its own over the same weights: ``carried_by``.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.patcher = _managed(adapter, adapter, comfy.model_management.get_torch_device())
        self._elsewhere: dict[torch.device, ModelPatcher] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedAdapter:
        return self

    def patcher_for(self, device: torch.device) -> ModelPatcher:
        """What a model that runs on ``device`` carries; the same object at each call."""
        if device == self.patcher.load_device:
            return self.patcher
        if device not in self._elsewhere:
            patcher = _managed(_copied(self.adapter), self.adapter, device)
            if hasattr(self.patcher, "clone_base_uuid"):  # by this ComfyUI matches copies
                patcher.clone_base_uuid = self.patcher.clone_base_uuid
            self._elsewhere[device] = patcher
        return self._elsewhere[device]

    def carried_by(self, model: ModelPatcher) -> Adapter | None:
        """The module that ``model`` carries, which only that model's own thread may run."""
        for patcher in model.get_additional_models_with_key(KEY):
            if patcher.get_attachment(KEY) is self.adapter:
                module: Adapter = patcher.model
                return module
        return None

    def in_call(self, guider: Any, extra: Options) -> Adapter:
        """The module that an attention patch may run.

        ``guider`` is the run's, ``extra`` what ComfyUI gave to the patch. On several GPUs each
        has a model and a thread of its own and calls the patches at the same time as the others,
        so that neither modules nor what they computed may be shared. Raises
        ``AdapterNotCarriedError``.
        """
        device = extra.get("multigpu_thread_device")
        model = (guider.model_options.get("multigpu_clones") or {}).get(device)
        if model is None:
            return self.carried_by(guider.model_patcher) or self.adapter
        module = self.carried_by(model)
        if module is None:
            raise AdapterNotCarriedError(
                f"The copy of the model on {device} came without its copy of the adapter: another "
                "node made this copy, or took the adapter out of it. Put that node before "
                "Infinite-ID Apply, or use ComfyUI's own MultiGPU CFG Split, which may stand on "
                "either side."
            )
        return module


def _managed(
    adapter: Adapter, original: Adapter, device: torch.device, disable_dynamic: bool = False
) -> ModelPatcher:
    """``adapter`` in the kind of patcher ComfyUI takes for its own models (dynamic VRAM's or not).

    ``original`` is the adapter of which it is a copy, or itself: by it ``LoadedAdapter`` knows
    every patcher that ComfyUI makes out of this one.
    """
    kind = ModelPatcher
    if not disable_dynamic:
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    offload_device = comfy.model_management.unet_offload_device()
    patcher = kind(adapter, load_device=device, offload_device=offload_device)
    patcher.set_attachments(KEY, original)
    # How ComfyUI makes it again for another GPU. Not from the file, which may be another by now.
    patcher.cached_patcher_init = (_managed_again, (original, device))
    return patcher


def _managed_again(
    original: Adapter, device: torch.device, disable_dynamic: bool = False
) -> ModelPatcher:
    return _managed(_copied(original), original, device, disable_dynamic)


def _copied(adapter: Adapter) -> Adapter:
    """Another module with the same weights; where these are not in use, the two share them."""
    rest = comfy.model_management.unet_offload_device()
    tensors = {name: tensor.to(rest) for name, tensor in adapter.state_dict().items()}
    return adapter.rebuilt(tensors, comfy.ops.manual_cast)


def load_adapter(path: str | Path, options: AdapterOptions | None = None) -> LoadedAdapter:
    """Read an adapter file for ComfyUI. Raises a subclass of ``FileError``."""
    return LoadedAdapter(read_adapter(path, comfy.ops.manual_cast, options))


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedIdentity(IdentityPlacement):
    """One Apply: an identity, its place in the run, and the adapter that reads it."""

    adapter: LoadedAdapter
    low_rank: LowRankUse = LowRankUse()
