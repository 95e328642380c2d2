"""Our training loop against a plain one: steps per second and peak memory.

    python benchmarks/trainer.py [--steps 40] [--rounds 3] [--threads 1] [--workers 0]

The plain loop works in the manner of IP-Adapter's SDXL training script: text encoders, autoencoder
and CLIP image encoder stay loaded, and each step decodes photos, encodes pixels, captions and
reference pictures, and leaves the text attention on. Both sides train the same adapter on the same
frozen tiny UNet with the same optimiser, batch and photos (``microworld``'s people, prepared once
before). Each runs in processes of its own, in turns; the first steps, in which libraries warm
up, are left out of the rate. Target: at least 1.3 times as fast, with less memory.

Ours encodes each photo once, before its first step; that is timed apart, and printed with the
number of steps after which it has paid for itself.

The tiny models' proportions are not SDXL's. So the arithmetic of one sample is also counted on
SDXL's shape (full UNet, ViT-H-14, 1024 px; nothing is computed). That is no measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where this file hides the package trainer

TARGET = 1.3
WARM_UP = 5  # steps
PEOPLE, PHOTOS = 12, 4
CONFIG = ROOT / "trainer" / "configs" / "tiny.toml"
FACE_MODELS = ROOT / "microworld" / "weights" / "insightface" / "models" / "microworld"
SIDES = ("plain", "ours")


def main() -> int:
    """Run the sides in turns and print the ratios of their medians; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    parser.add_argument("--no-count", dest="count", action="store_false", help="no SDXL arithmetic")
    parser.add_argument("--side", choices=(*SIDES, "fill", "count"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.side:
        print(json.dumps(_CHILDREN[values.side](values)))
        return 0
    with tempfile.TemporaryDirectory(prefix="infinite-id-trainer-") as folder:
        return compare(values, Path(folder))


def compare(values: argparse.Namespace, folder: Path) -> int:
    """Make the data, fill the caches, run the rounds, print."""
    make_data(folder)
    filled = child("fill", values, folder)
    print(
        f"caches filled once: {filled['cpu']:.1f} s of CPU, peak {filled['peak'] / 2**20:.0f} MiB"
    )
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(values.rounds):
        for side in SIDES:
            rounds[side].append(child(side, values, folder))
        print(f"round {number + 1}: " + ", ".join(
            f"{side} {1 / rounds[side][-1]['wall']:.2f} steps/s, "
            f"{rounds[side][-1]['cpu']:.3f} s of CPU a step, "
            f"peak {rounds[side][-1]['peak'] / 2**20:.0f} MiB" for side in SIDES
        ), flush=True)  # fmt: skip
    plain, ours = (
        {name: statistics.median(run[name] for run in rounds[side]) for name in ("wall", "cpu")}
        for side in SIDES
    )
    for found, side in ((plain, "plain"), (ours, "ours")):
        # A system short of memory takes library pages back: a peak is seen too low, never too high.
        found["peak"] = max(run["peak"] for run in rounds[side])
    speed, by_cpu = plain["wall"] / ours["wall"], plain["cpu"] / ours["cpu"]
    memory = ours["peak"] / plain["peak"]
    saved = plain["cpu"] - ours["cpu"]
    print(f"speed   ours / plain = {speed:.2f}; by CPU time {by_cpu:.2f} (target {TARGET})")
    print(f"memory  ours / plain = {memory:.3f}, {(plain['peak'] - ours['peak']) / 2**20:.0f} MiB "
          f"less (target below 1)")  # fmt: skip
    if saved > 0:
        print(f"the caches have paid for themselves after {filled['cpu'] / saved:.0f} steps")
    if values.count:
        counted = child("count", values, folder)
        print(
            f"counted on SDXL at 1024 px, teraflop a sample: ours {counted['ours']:.1f}, plain "
            f"{counted['plain']:.1f} = {counted['plain'] / counted['ours']:.2f} times"
        )
    # Where data workers read, their CPU time is not seen here.
    fast = by_cpu if values.workers == 0 else speed
    return int(fast < TARGET or memory >= 1)


def make_data(folder: Path) -> None:
    """Synthetic people, prepared by the documented commands."""
    people = ["microworld", "people", folder / "people", "--people", PEOPLE, "--photos", PHOTOS]
    prepare = ["trainer", "prepare", folder / "people", folder / "data", "--face-models",
               FACE_MODELS, "--no-report", "--no-progress"]  # fmt: skip
    for command in (people, prepare):
        words = [sys.executable, "-m", *map(str, command)]
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def child(side: str, values: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One side in a process of its own: what it measured."""
    words = [sys.executable, __file__, "--side", side, "--folder", folder]
    words += ["--steps", values.steps, "--threads", values.threads, "--workers", values.workers]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(values.threads)}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- in the children ---------------------------------------------------------------------------


def settings(values: argparse.Namespace, output: str) -> Any:
    """The tiny configuration, on this bench's data, without logs, checkpoints and previews."""
    from trainer.config_file import read_config

    folder: Path = values.folder
    changes = {
        "run.output": folder / output,
        "run.steps": values.steps + WARM_UP,
        "data.folder": folder / "data",
        "data.workers": values.workers,
        "checkpoints.every": 10**6,
        "log.trackers": "[]",
        "previews.every": 0,
    }
    return read_config(CONFIG, [f"{key}={value}" for key, value in changes.items()])


def run_fill(values: argparse.Namespace) -> dict[str, float]:
    """Fill the caches as the first run does."""
    import torch

    from trainer.data_index import Dataset
    from trainer.train.features import compute_missing, fingerprints_of
    from trainer.train.log import no_bar
    from trainer.train.samples import Caches, Keys, Plan

    config = settings(values, "fill")
    plan = Plan(config, Dataset(config.data.folder, config.filters, "train"), 1)
    keys = Keys(config=config, fingerprints=fingerprints_of(config))
    before = time.process_time()
    device = torch.device("cpu")
    compute_missing(plan, keys, Caches.below(config), device, progress=no_bar)
    return {"cpu": time.process_time() - before, "peak": peak_memory()}


def run_ours(values: argparse.Namespace) -> dict[str, float]:
    """``python -m trainer train``, caches filled; every run starts anew."""
    from trainer.train.loop import train

    clock = StepClock()
    outcome = train(settings(values, f"ours-{os.getpid()}"))
    assert outcome.finished
    return clock.result()


def run_plain(values: argparse.Namespace) -> dict[str, float]:
    """Everything loaded, everything encoded in every step."""
    import torch
    from accelerate import Accelerator
    from torch.nn.functional import mse_loss

    from infinite_id_core.encoders.clip_vision import hidden_states
    from infinite_id_core.hosts.diffusers_train import identity_training
    from trainer.data_index import Dataset
    from trainer.models.image_encoder import load_image_encoder
    from trainer.models.text import TOKENS, load_text_encoders
    from trainer.models.vae import load_vae
    from trainer.train.checks import adapter_config
    from trainer.train.objective import TrainingModel
    from trainer.train.optimisers import build_optimiser
    from trainer.train.parts import new_adapter, prepare_unet

    config = settings(values, "plain")
    accelerator = Accelerator(cpu=True)
    device = accelerator.device
    dataset = Dataset(config.data.folder, config.filters, "train")
    loaded = prepare_unet(config, device)
    vae = load_vae(config.model.vae_source)
    text = load_text_encoders(config.model.text_source)
    clip = load_image_encoder(config.encoder.clip_model, config.encoder.clip_weights)
    adapter = new_adapter(
        config, adapter_config(config, dataset, loaded.context_width), loaded.unet
    )
    module = TrainingModel(adapter, loaded.unet, loaded.pooled_width)
    optimiser = build_optimiser(config.optimiser, list(adapter.parameters()), device)
    loader = torch.utils.data.DataLoader(
        _photos(dataset, config.data.resolution),
        batch_size=config.optimiser.batch,
        shuffle=True,
        drop_last=True,
        num_workers=config.data.workers,
        collate_fn=lambda samples: {k: [s[k] for s in samples] for k in samples[0]},
    )
    model, optimiser, loader = accelerator.prepare(module, optimiser, loader)
    alphas = loaded.schedule.alphas_cumprod.float()
    clock, step = StepClock(), 0
    with identity_training(loaded.unet, adapter, text_tokens=TOKENS):
        while step < config.run.steps:
            for batch in loader:
                if step == config.run.steps:
                    break
                with torch.no_grad():
                    latents = vae.encode(torch.stack(batch["pixels"]))
                    states = hidden_states(clip, batch["reference"], config.encoder.clip_layer)
                    prompt = text.encode(batch["caption"])
                noise = torch.randn_like(latents)
                timestep = torch.randint(0, len(alphas), (len(latents),))
                alpha = alphas[timestep].view(-1, 1, 1, 1)
                noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
                inputs = {
                    "timestep": timestep,
                    "size_ids": torch.tensor(batch["size_ids"], dtype=torch.float32),
                    "face": torch.stack(batch["face"]),
                    "clip": states,
                    "context": prompt.context,
                    "pooled": prompt.pooled,
                }
                loss = mse_loss(model(noisy, inputs).float(), noise)
                accelerator.gather(loss.repeat(len(latents))).mean().item()
                accelerator.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
                step += 1
    return clock.result()


def _photos(dataset: Any, side: int) -> Any:
    """Row number -> decoded and resized photo, its caption, its face: read anew each time."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.nn.functional import normalize

    def picture(photo: Image.Image, size: int) -> torch.Tensor:
        resized = photo.resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)

    class Photos(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, number: int) -> dict[str, Any]:
            photo = dataset.photo(number)
            width, height = photo.size
            return {
                "pixels": picture(photo, side).permute(2, 0, 1),
                "reference": picture(photo, 224),
                "caption": dataset.row(number).caption,
                "face": normalize(torch.from_numpy(dataset.face(number)), dim=0),
                "size_ids": (height, width, 0, 0, side, side),
            }

    return Photos()


class StepClock:
    """Times of every optimiser step of this process, whoever makes it."""

    def __init__(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.times: list[tuple[float, float]] = []
        register_optimizer_step_post_hook(lambda *_: self._stamp())

    def _stamp(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def result(self) -> dict[str, float]:
        """Seconds a step after the warm-up, and the peak of memory in bytes."""
        first, last = self.times[WARM_UP - 1], self.times[-1]
        steps = len(self.times) - WARM_UP
        wall, cpu = ((b - a) / steps for a, b in zip(first, last, strict=True))
        return {"wall": wall, "cpu": cpu, "peak": peak_memory()}


def peak_memory() -> float:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent had before exec
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)


# --- SDXL's arithmetic ---------------------------------------------------------------------------


def run_count(_values: argparse.Namespace) -> dict[str, float]:
    """Teraflop of one sample of a training step on SDXL's shape, by torch's own counter."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from infinite_id_core.hosts.diffusers_unet import unet_layers
    from infinite_id_core.method.adapter import infinite_id_adapter
    from infinite_id_core.method.records import AdapterConfig
    from trainer.models.text import TOKENS
    from trainer.train.estimate import measure_pass

    side = 1024
    with torch.device("meta"):
        unet = sdxl_unet()
        vae = _sdxl_vae()
        vision = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).visual
        small = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                               num_attention_heads=12)  # fmt: skip
        large = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                               num_attention_heads=20, projection_dim=1280)  # fmt: skip
        texts = CLIPTextModel(small), CLIPTextModelWithProjection(large)
        config = AdapterConfig(clip_width=1280, context_width=2048, recogniser="any",
                               clip_model="any")  # fmt: skip
        adapter = infinite_id_adapter(
            config, {layer.path: layer.width for layer in unet_layers(unet)}
        )
        unet.requires_grad_(False)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vae.encode(torch.zeros(1, 3, side, side))
            vision(torch.zeros(1, 3, 224, 224))
            for encoder in texts:
                encoder(tokens)
    encoders = counter.get_total_flops()
    passes = {
        name: measure_pass(unet, adapter, batch=1, resolution=side, text_tokens=count).flops
        for name, count in (("ours", 0), ("plain", TOKENS))
    }
    return {"ours": passes["ours"] / 1e12, "plain": (passes["plain"] + encoders) / 1e12}


def sdxl_unet(width: int = 320) -> Any:
    """diffusers' UNet of SDXL's shape, ``width`` channels at its finest level."""
    import diffusers

    build: Any = diffusers.UNet2DConditionModel
    return build(
        sample_size=128,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        # The number of heads, 64 wide each (a known misnomer).
        attention_head_dim=tuple(max(1, width * m // 64) for m in (1, 2, 4)),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def _sdxl_vae() -> Any:
    import diffusers

    build: Any = diffusers.AutoencoderKL
    return build(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )


_CHILDREN: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "ours": run_ours,
    "plain": run_plain,
    "fill": run_fill,
    "count": run_count,
}

if __name__ == "__main__":
    sys.exit(main())
