"""One guided step of two streams (goal: 2.2x) and of one (1.03x) against plain SDXL, one UNet.

    .venv/bin/python benchmarks/two_streams.py                     # arithmetic, nothing is run
    .venv/bin/python benchmarks/two_streams.py --time --size 512   # seconds; needs 12 GB of memory

Arithmetic: floating-point operations of one guided step on SDXL's real shape, counted on tensors
without data; a fair share only where the machine is busy with arithmetic, but exact. Time: whole
sampling runs in ComfyUI with random weights, plain and patched in turn, ratio pair by pair.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from run import find_host  # noqa: E402 - found through the line above

CLIP_WIDTH = 1280
CFG = 5.0


def enter_host() -> None:
    host = find_host()
    if host is None:
        raise SystemExit("No ComfyUI found: set COMFYUI_PATH, or run python run.py setup.")
    sys.path.insert(0, str(host))
    import torch

    arguments = [] if torch.cuda.is_available() else ["--cpu"]
    sys.argv = [sys.argv[0], "--use-pytorch-cross-attention", *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # noqa: F401 - the host's own import order


def sdxl(device: Any, dtype: Any) -> Any:
    """SDXL's UNet at full size, random weights, under ComfyUI's model management."""
    import comfy.model_management
    import comfy.supported_models
    import torch
    from comfy.model_patcher import ModelPatcher

    shape = {
        **comfy.supported_models.SDXL.unet_config,
        "in_channels": 4,
        "out_channels": 4,
        "image_size": 32,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "num_classes": "sequential",
        "use_spatial_transformer": True,
        "use_checkpoint": False,
        "legacy": False,
        "use_temporal_resblock": False,
    }
    config = comfy.supported_models.SDXL(shape)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device)
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(0)
        for parameter in model.diffusion_model.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
    place = comfy.model_management.get_torch_device()
    return ModelPatcher(model, load_device=place, offload_device=place)


def adapter_and_identity(model: Any, device: Any, dtype: Any) -> tuple[Any, Any]:
    import comfy.ops
    import torch

    from infinite_id_core.hosts.comfyui import model_layers
    from infinite_id_core.hosts.comfyui_adapter import LoadedAdapter
    from infinite_id_core.method.adapter import infinite_id_adapter
    from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
    from infinite_id_core.method.records import AdapterConfig

    config = AdapterConfig(
        clip_width=CLIP_WIDTH, context_width=2048, recogniser="bench", clip_model="bench"
    )
    widths = {layer.path: layer.width for layer in model_layers(model)}
    with torch.device(device):
        adapter = infinite_id_adapter(config, widths, comfy.ops.manual_cast)
        adapter.to(dtype).requires_grad_(False)
    if device.type != "meta":
        for parameter in adapter.parameters():
            parameter.data.normal_(0, 0.02)
    identity = face_clip_identity(
        face=torch.randn(1, 512),
        clip=torch.randn(1, 257, CLIP_WIDTH),
        weight=torch.ones(1),
        config=IdentityConfig(recogniser="bench", clip_model="bench"),
    )
    return LoadedAdapter(adapter), identity


def count(size: int) -> None:
    """Operations of one guided step: two rows plain and in one stream, four in two streams."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from infinite_id_core.hosts.comfyui import apply_identity, streams_of
    from infinite_id_core.hosts.comfyui_run import SamplingRun
    from infinite_id_core.method.attention import StreamOptions

    meta = torch.device("meta")
    model = sdxl(meta, torch.float16)
    adapter, identity = adapter_and_identity(model, meta, torch.float16)
    conds = {k: [{"uuid": k}] for k in ("positive", "negative")}

    def patches(stream_options: StreamOptions) -> dict[str, Any]:
        patched = apply_identity(model, adapter, identity, options=stream_options)
        guider = SimpleNamespace(model_patcher=patched, conds=conds, model_options={})
        streams = streams_of(patched)
        assert streams is not None
        shape = [1, 4, size // 8, size // 8]
        run = SamplingRun(streams.applied, streams.options, streams.layers, guider, shape)
        run.state.asked_rows = 1
        options: dict[str, Any] = run.patched_options(
            {"transformer_options": {}},
            [conds["positive"], conds["negative"]],
            run.identities.active(1.0),
            "both" if run.identities.two_streams else "one",
        )["transformer_options"]
        return options

    def operations(rows: int, transformer_options: dict[str, Any]) -> int:
        extra = {
            "cond_or_uncond": [1, 0],
            "uuids": ["negative", "positive"],
            "original_shape": [rows, 4, size // 8, size // 8],
        }
        half = {"device": meta, "dtype": torch.float16}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.model.diffusion_model(
                torch.empty(rows, 4, size // 8, size // 8, **half),
                torch.empty(rows, device=meta),
                torch.empty(rows, 77, 2048, **half),
                torch.empty(rows, 2816, **half),
                transformer_options={**transformer_options, **extra},
            )
        return counter.get_total_flops()

    plain = operations(2, {})
    options = patches(StreamOptions())
    first, later = operations(4, options), operations(4, options)
    options = patches(StreamOptions(mixing="off"))
    one_first, one_later = operations(2, options), operations(2, options)
    print(f"SDXL, {size} px, one guided step (positive and negative), batch 1")
    print(f"{'':24}{'TFLOP':>9}{'ratio':>8}")
    print(f"{'plain SDXL':24}{plain / 1e12:9.3f}{1:8.3f}")
    print(f"{'two streams, first step':24}{first / 1e12:9.3f}{first / plain:8.3f}")
    print(f"{'two streams, later':24}{later / 1e12:9.3f}{later / plain:8.3f}")
    print(f"{'one stream, first step':24}{one_first / 1e12:9.3f}{one_first / plain:8.3f}")
    print(f"{'one stream, later':24}{one_later / 1e12:9.3f}{one_later / plain:8.3f}")


def clock(size: int, steps: int, pairs: int) -> None:
    """Seconds of whole runs, plain and patched in turn."""
    import comfy.model_management
    import comfy.sample
    import torch

    from infinite_id_core.hosts.comfyui import apply_identity
    from infinite_id_core.method.attention import StreamOptions

    place = comfy.model_management.get_torch_device()
    dtype = torch.float32 if place.type == "cpu" else torch.float16
    model = sdxl(place, dtype)
    adapter, identity = adapter_and_identity(model, place, dtype)
    models = {
        "plain": model,
        "own": apply_identity(model, adapter, identity),
        "shared": apply_identity(
            model, adapter, identity, options=StreamOptions(text_stream="shared")
        ),
        "one": apply_identity(model, adapter, identity, options=StreamOptions(mixing="off")),
    }
    latent = torch.zeros(1, 4, size // 8, size // 8)
    text = [[torch.randn(1, 77, 2048), {"pooled_output": torch.randn(1, 1280)}]]

    def seconds(which: str) -> float:
        noise = comfy.sample.prepare_noise(latent, 0)
        begun = time.perf_counter()
        with torch.inference_mode():
            comfy.sample.sample(
                models[which], noise, steps, CFG, "euler", "normal", text, text, latent, seed=0,
                disable_pbar=True,
            )  # fmt: skip
        if place.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for which in models:
        seconds(which)  # warms up
    rows = [{which: seconds(which) for which in models} for _ in range(pairs)]
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)
    print(f"SDXL, {size} px, {steps} guided steps, {name}, {dtype}, median of {pairs}")
    for which in models:
        middle = statistics.median(r[which] for r in rows)
        ratios = [r[which] / r["plain"] for r in rows]
        print(
            f"{which:8}{middle / steps:9.3f} s a step   ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--time", action="store_true", help="run it instead of counting")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    enter_host()
    if options.time:
        clock(options.size, options.steps, options.pairs)
    else:
        count(options.size)


if __name__ == "__main__":
    main()
