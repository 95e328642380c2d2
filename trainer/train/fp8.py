"""The frozen UNet's weights in 8 bits: half the memory of bfloat16, trained through as before.

Each weight of a Linear or Conv2d inside UNet blocks is stored as ``float8_e4m3fn`` with one
scale, a power of two, for each output channel, and widened where it multiplies: in the forward
pass and again in the backward pass. Nothing wide is kept between the two. (Casting a layer's
weights before its forward pass and back after it, as layerwise casting for inference does, leaves
the backward pass narrow weights.) Biases, norms, embeddings and what learns keep their precision.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from infinite_id_core.hosts.diffusers_unet import unet_layers

from ..errors import ConfigValueError

_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
_LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_SCALE = 2.0**-14  # fp16's smallest normal number


def check_fp8(device: torch.device) -> None:
    """Raise ``ConfigValueError`` where this torch or device has no 8-bit floats."""
    try:
        torch.ones(1, device=device).to(torch.float8_e4m3fn).to(torch.float32)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ConfigValueError(
            f"model.unet_dtype 'fp8' needs float8_e4m3fn, which torch {torch.__version__} does not "
            f'have on {device.type}. Set model.unet_dtype = "precision", or install a newer '
            "torch."
        ) from error


def narrow(unet: Any, *, text: bool = False) -> None:
    """Store the weights of a diffusers SDXL UNet's blocks in 8 bits, in place.

    The text's K/V, which a new adapter copies, are left as they are unless ``text``. What is
    narrow already stays so. On the meta device, too.
    """
    kept = set()
    if not text:
        paths = (f"{layer.path}.attn2" for layer in unet_layers(unet))
        kept = {f"{path}.{part}" for path in paths for part in ("to_k", "to_v")}
    for name, module in list(unet.named_modules()):
        if name.partition(".")[0] not in _BLOCKS or name in kept:
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            owner, _, last = name.rpartition(".")
            kind = NarrowConv2d if isinstance(module, nn.Conv2d) else NarrowLinear
            setattr(unet.get_submodule(owner), last, kind(cast(Any, module)))


def _narrowed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[out, ...]`` -> its 8-bit form and scales ``[out, 1, ...]`` in the weight's dtype."""
    wide = weight.detach().float()
    largest = wide.abs().amax(dim=tuple(range(1, wide.ndim)), keepdim=True)
    # Powers of two: widening is then exact, in 16 bits as well.
    scale = torch.exp2(torch.ceil(torch.log2(largest / _LARGEST))).clamp(min=_SMALLEST_SCALE)
    return (wide / scale).to(torch.float8_e4m3fn), scale.to(weight.dtype)


class _Narrow(nn.Module):
    """What both kinds keep: an 8-bit weight, its scales, and a bias in the arithmetic's dtype."""

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight, scale = _narrowed(module.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = module.bias

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return self.scale.dtype

    def widened(self) -> Tensor:
        """The weight in the arithmetic's dtype."""
        return self.weight.to(self.dtype) * self.scale


class NarrowLinear(_Narrow):
    """A frozen ``nn.Linear`` with its weight ``[out, in]`` in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        return _product(x, self)

    def multiply(self, x: Tensor) -> Tensor:
        """The layer itself."""
        return functional.linear(x, self.widened(), self.bias)

    def transposed(self, gradient: Tensor, _shape: torch.Size) -> Tensor:
        """From the output's gradient to the input's."""
        return gradient @ self.widened()


class NarrowConv2d(_Narrow):
    """A frozen ``nn.Conv2d`` with its weight ``[out, in, kh, kw]`` in 8 bits."""

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__(module)
        self.options: dict[str, Any] = {
            "stride": module.stride,
            "padding": module.padding,
            "dilation": module.dilation,
            "groups": module.groups,
        }

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, h, w]`` -> ``[B, out, h', w']``."""
        return _product(x, self)

    def multiply(self, x: Tensor) -> Tensor:
        """The layer itself."""
        return functional.conv2d(x, self.widened(), self.bias, **self.options)

    def transposed(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """From the output's gradient to the input's, of ``shape``."""
        back: Any = conv2d_input
        return cast(Tensor, back(shape, self.widened(), gradient, **self.options))


def _product(x: Tensor, layer: NarrowLinear | NarrowConv2d) -> Tensor:
    apply: Any = _Product.apply
    return cast(Tensor, apply(x, layer))


class _Product(torch.autograd.Function):
    """A frozen layer's product that keeps neither its input nor a wide weight for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NarrowLinear | NarrowConv2d) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.multiply(x.to(layer.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        return layer.transposed(gradients[0].to(layer.dtype), ctx.shape).to(ctx.dtype), None
