"""InstantID's ControlNet ("IdentityNet") in ComfyUI.

It reads the identity's tokens where other ControlNets read the prompt. ComfyUI's own ControlNet
takes another context where a call has one (``crossattn_controlnet``), but hands the same to a whole
chain. So the tokens travel with the conditioning under a name of their own, and one link of the
chain shows them to its ControlNet alone. Nothing is patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_management
import torch
from comfy.controlnet import ControlBase
from torch import Tensor

from ..errors import NotIdentityNetError, NotInstantIDError, OptionError, PatchConflictError
from ..method.adapter import Adapter, check_identity
from ..method.attention import MAX_STRENGTH
from ..method.face_clip import FACE
from ..method.identity import Identity
from ..method.published import BUFFALO
from ..method.resampler import FaceResampler
from .comfyui_adapter import LoadedAdapter

Conditioning = list[list[Any]]
"""ComfyUI's: ``[text, details]`` each."""

_KEY = "infinite_id_pose_{}"
_CONTEXT = "crossattn_controlnet"  # where the host's ControlNet looks before it takes the prompt


@dataclass(frozen=True, kw_only=True)
class PoseOptions:
    """How strongly a ControlNet acts, and when. Raises ``OptionError``."""

    strength: float = 0.8
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= MAX_STRENGTH:
            raise OptionError(f"strength must lie in [0, {MAX_STRENGTH}], got {self.strength}.")
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise OptionError(
                "start_percent and end_percent must satisfy 0 <= start <= end <= 1, got "
                f"{self.start_percent} and {self.end_percent}."
            )


class IdentityControl(ControlBase):  # type: ignore[misc]
    """A link of ComfyUI's chain of ControlNets whose ControlNet reads tokens, not the prompt."""

    def __init__(self, control: Any, key: str) -> None:
        """``control``: a ControlNet with its hint set, in no chain; ``key``: of its tokens."""
        super().__init__()
        self.control = control
        self.key = key
        self.extra_hooks = control.extra_hooks

    def get_control(self, x: Tensor, t: Tensor, cond: Any, conds: int, *args: Any) -> Any:
        """The host's: what this ControlNet and those before it add to the UNet."""
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x, t, cond, conds, *args)
        if self.key not in cond:
            raise PatchConflictError(
                "Another node moved Face Pose's ControlNet to a conditioning without the person's "
                "tokens. Put Face Pose after that node."
            )
        ours = self.control.get_control(x, t, {**cond, _CONTEXT: cond[self.key]}, conds, *args)
        if ours is None or before is None:
            return before if ours is None else ours
        return self.control_merge(ours, before, output_dtype=None)

    def pre_run(self, *args: Any) -> None:
        """The host's, before a run."""
        super().pre_run(*args)
        self.control.pre_run(*args)

    def cleanup(self) -> None:
        """The host's, after a run."""
        super().cleanup()
        self.control.cleanup()

    def get_models(self) -> list[Any]:
        """The host's: what is to be loaded."""
        return [*super().get_models(), *self.control.get_models()]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """The host's, in bytes."""
        own = self.control.inference_memory_requirements(dtype)
        return int(own + super().inference_memory_requirements(dtype))

    def copy(self) -> IdentityControl:
        """The host's: another link with the same ControlNet, in no chain."""
        return IdentityControl(self.control.copy(), self.key)

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> Any:
        """The host's: the same on another GPU."""
        clone = IdentityControl(self.control.deepclone_multigpu(load_device), self.key)
        if autoregister:
            self.multigpu_clones[load_device] = clone
        return clone


def add_pose(
    positive: Conditioning,
    negative: Conditioning,
    control_net: Any,
    adapter: LoadedAdapter,
    identity: Identity,
    drawings: Tensor,
    options: PoseOptions,
) -> tuple[Conditioning, Conditioning]:
    """Both conditionings with a ControlNet that reads the identity, or nobody in the negative.

    ``drawings [n, H, W, 3]``: one for all pictures of the batch, or one each. A strength of 0 adds
    nothing. Raises ``NotInstantIDError``, ``NotIdentityNetError``, ``IdentityMismatchError``.
    """
    check_instantid(adapter.adapter)
    check_identity_net(control_net, adapter.adapter.config.context_width)
    check_identity(adapter.adapter, identity)
    if options.strength == 0.0:
        return positive, negative
    links: dict[Any, IdentityControl] = {}

    def link(before: Any) -> IdentityControl:
        if before not in links:
            links[before] = _link(control_net, drawings, options, before)
        return links[before]

    who, nobody = _tokens(adapter, identity)
    return _with_control(positive, who, link), _with_control(negative, nobody, link)


def check_instantid(adapter: Adapter) -> None:
    """Raise ``NotInstantIDError`` unless InstantID's ControlNet can read this adapter's tokens."""
    projector = adapter.projector
    if isinstance(projector, FaceResampler) and projector.needs[FACE].model != BUFFALO:
        return
    raise NotInstantIDError(
        "Face Pose is for InstantID: its ControlNet reads the tokens of InstantID's adapter. This "
        f"adapter is: {adapter.config.summary.splitlines()[0]}. Choose InstantID's ip-adapter.bin "
        "in Loader, or leave Face Pose out: the adapter works without it. For the pose alone, use "
        "ComfyUI's own Apply ControlNet with a ControlNet for poses."
    )


def check_identity_net(control_net: Any, context_width: int) -> None:
    """Raise ``NotIdentityNetError`` for a ControlNet that cannot read tokens of this width."""
    network = getattr(control_net, "control_model", None)
    widths = sorted(set(_context_widths(network)))
    if widths == [context_width]:
        return
    found = f"one that reads {' and '.join(map(str, widths))} numbers a token" if widths else (
        f"a {type(control_net).__name__}, which has no cross-attention of its own"
    )  # fmt: skip
    raise NotIdentityNetError(
        f"Expected InstantID's ControlNet, which reads {context_width} numbers a token as SDXL "
        f"does; got {found}. Load InstantID's ControlNetModel/diffusion_pytorch_model.safetensors "
        "(put it into models/controlnet) with Load ControlNet Model."
    )


def _context_widths(network: Any) -> Iterator[int]:
    """How wide the tokens are that a network's cross-attention layers read."""
    modules = network.named_modules() if isinstance(network, torch.nn.Module) else ()
    for name, module in modules:
        # Of the module, not its weight: quantised and unloaded weights hide their shape.
        if name.endswith(".attn2") and hasattr(module, "to_k"):
            yield int(module.to_k.in_features)


def _tokens(adapter: LoadedAdapter, identity: Identity) -> tuple[Tensor, Tensor]:
    """The tokens of an identity and of nobody, each ``[1, M, C]`` in float32 on the CPU."""
    comfy.model_management.load_models_gpu([adapter.patcher])
    place = {"device": adapter.patcher.load_device, "dtype": torch.float32}
    with torch.no_grad():
        who = adapter.adapter.tokens(identity, **place)
        nobody = adapter.adapter.null_tokens(identity, **place)
    return who.cpu(), nobody.cpu()


def _link(control_net: Any, drawings: Tensor, options: PoseOptions, before: Any) -> IdentityControl:
    """The ControlNet as the next link after ``before``."""
    hint, span = drawings.movedim(-1, 1), (options.start_percent, options.end_percent)
    control = control_net.copy().set_cond_hint(hint, options.strength, span)
    made = IdentityControl(control, _KEY.format(sum(1 for _ in _ours(before))))
    made.set_previous_controlnet(before)
    return made


def _ours(control: Any) -> Iterator[IdentityControl]:
    """Links of this kind in a chain."""
    while control is not None:
        if isinstance(control, IdentityControl):
            yield control
        control = control.previous_controlnet


def _with_control(conditioning: Conditioning, tokens: Tensor, link: Any) -> Conditioning:
    added = []
    for text, details in conditioning:
        control = link(details.get("control"))
        carried = {**details.get("model_conds", {}), control.key: comfy.conds.CONDCrossAttn(tokens)}
        # The host's node sets the last one too: the negative has a ControlNet of its own.
        more = {"control": control, "model_conds": carried, "control_apply_to_uncond": False}
        added.append([text, {**details, **more}])
    return added
