"""Nodes that look at rows: under Apply they see what they would see without it.

An Apply whose every term is zero must leave the picture of the node as it was, whatever the node
counts, compares or remembers. (One that is heard must change it.)
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_version import __version__ as HOST_VERSION

from .runs import SIZE, error, run
from .tiny_sdxl import conditioning, tiny_identity, tiny_model

Node = Callable[[Any], Any]


def _extra(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"comfy_extras.{module}"), name)


def _v3(module: str, name: str, *args: Any) -> Node:
    return lambda model: _extra(module, name).execute(model, *args).result[0]


def _old(module: str, name: str, *args: Any) -> Node:
    return lambda model: _extra(module, name)().patch(model, *args)[0]


def hypnotised(model: Any) -> Any:
    """A guidance function that remembers in its closure, and mixes rows of one stream."""
    before: list[torch.Tensor] = []

    def post_cfg(args: Any) -> torch.Tensor:
        denoised = args["denoised"]
        if before and before[-1].shape == denoised.shape:
            denoised = denoised + 0.2 * before[-1] - 0.1 * denoised.mean(dim=0, keepdim=True)
        before.append(denoised)
        return denoised

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


def reweighted(model: Any) -> Any:
    """A wrapper around the model that counts rows: each cond's last row louder."""

    def wrapper(apply_model: Any, args: Any) -> torch.Tensor:
        out = apply_model(args["input"], args["timestep"], **args["c"])
        parts = [part.clone() for part in out.chunk(len(args["cond_or_uncond"]))]
        for part in parts:
            part[-1] *= 1.1
        return torch.cat(parts)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


class Momentum:
    """Guidance that remembers in an object."""

    before: torch.Tensor | None = None

    def __call__(self, args: Any) -> torch.Tensor:
        denoised = args["denoised"]
        if self.before is not None:
            denoised = denoised + 0.3 * self.before
        self.before = args["denoised"]
        return denoised

    def wrap(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = executor(x, *args, **kwargs)
        kept, self.before = self.before, out
        return out if kept is None or kept.shape != out.shape else out + 0.2 * kept


def in_an_object(model: Any) -> Any:
    momentum, clone = Momentum(), model.clone()
    clone.set_model_sampler_post_cfg_function(lambda args: momentum(args))
    return clone


def as_an_object(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(Momentum())
    return clone


def as_a_method(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(Momentum().__call__)
    return clone


def in_a_default(model: Any) -> Any:
    def post_cfg(args: Any, kept: Any = None) -> torch.Tensor:
        kept["inner"].append(args["denoised"])
        return args["denoised"] + 0.3 * kept["inner"][max(len(kept["inner"]) - 2, 0)]

    post_cfg.__defaults__ = ({"inner": []},)
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


def in_the_options(model: Any) -> Any:
    def post_cfg(args: Any) -> torch.Tensor:
        kept = args["model_options"]["transformer_options"]["theirs"]["deep"]
        kept.append(args["denoised"])
        return args["denoised"] + 0.3 * kept[max(len(kept) - 2, 0)]

    clone = model.clone()
    clone.model_options["transformer_options"]["theirs"] = {"deep": []}
    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


def around_the_model(model: Any) -> Any:
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", Momentum().wrap)
    return clone


NODES: dict[str, Node] = {
    "RenormCFG": _v3("nodes_lumina2", "RenormCFG", 100.0, 1.0),
    "VideoLinearCFGGuidance": _old("nodes_video_model", "VideoLinearCFGGuidance", 1.0),
    "VideoTriangleCFGGuidance": _old("nodes_video_model", "VideoTriangleCFGGuidance", 1.0),
    "SelfAttentionGuidance": _v3("nodes_sag", "SelfAttentionGuidance", 0.8, 2.0),
    "PerturbedAttentionGuidance": _v3("nodes_pag", "PerturbedAttentionGuidance", 2.0),
    "APG": _v3("nodes_apg", "APG", 1.0, 5.0, -0.5),
    "Mahiro": _v3("nodes_mahiro", "Mahiro"),
    "TCFG": _v3("nodes_tcfg", "TCFG"),
    "FreSca": _v3("nodes_fresca", "FreSca", 1.0, 1.5, 2),
    "PerpNeg": lambda model: (
        _extra("nodes_perpneg", "PerpNeg").execute(model, conditioning(7), 1.0).result[0]
    ),
    "EasyCache": _v3("nodes_easycache", "EasyCacheNode", 0.6, 0.1, 0.9, False),
    "LazyCache": _v3("nodes_easycache", "LazyCacheNode", 0.6, 0.1, 0.9, False),
    "remembering guidance": hypnotised,
    "guidance that remembers in an object": in_an_object,
    "guidance that is an object": as_an_object,
    "guidance that is a method": as_a_method,
    "guidance that remembers in a default": in_a_default,
    "guidance that remembers in the options": in_the_options,
    "model wrapper": reweighted,
    "model wrapper that remembers": around_the_model,
}
# Where the host's own code fails at batch 2, with or without Apply.
ONE_ROW_ONLY = {"RenormCFG"} | ({"EasyCache"} if HOST_VERSION == "0.3.64" else set())
LARGE = {"SelfAttentionGuidance"}  # it leaves small latents alone


@pytest.mark.parametrize("text_stream", ["own", "shared"])
@pytest.mark.parametrize("name", NODES)
def test_sees_one_streams_rows(silent: Any, model: Any, name: str, text_stream: str) -> None:
    node, part = NODES[name], {"start_percent": 0.2, "end_percent": 0.6}
    for rows in (1,) if name in ONE_ROW_ONLY else (1, 2):
        noise = _noise(rows, name)
        plain = run(node(model), noise=noise, steps=6)
        for changed in (
            node(silent(model, text_stream)),
            node(silent(model, text_stream, **part)),
            silent(node(model), text_stream, **part),
        ):
            assert error(run(changed, noise=noise, steps=6), plain) < 1e-4


@pytest.mark.parametrize("name", NODES)
def test_node_does_something(model: Any, patched: Any, host: Any, name: str) -> None:
    """Else the test above would show nothing; and the person is heard under each of them."""
    node = NODES[name]
    noise = _noise(1, name)
    plain = run(node(model), noise=noise, steps=6)
    assert error(plain, run(model, noise=noise, steps=6)) > 1e-3
    loud = run(node(patched), noise=noise, steps=6)
    assert loud.isfinite().all() and error(loud, plain) > 1e-3


def _noise(rows: int, name: str) -> torch.Tensor:
    size = SIZE * 2 if name in LARGE else SIZE
    return torch.randn(rows, 4, size, size, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def spied(model: Any, seen: dict[str, set[int]]) -> Any:
    """Every place where another pack can look at rows, noting how many there are."""

    def note(place: str, x: torch.Tensor) -> None:
        seen.setdefault(place, set()).add(x.shape[0])

    def wrapper(place: str, index: int) -> Callable[..., Any]:
        def wrap(executor: Any, *args: Any, **kwargs: Any) -> Any:
            note(place, args[index])
            return executor(*args, **kwargs)

        return wrap

    def guidance(place: str, result: str) -> Callable[[Any], Any]:
        def function(args: Any) -> Any:
            note(place, args["input"])
            if result == "cfg":
                difference = args["cond"] - args["uncond"]
                return args["uncond"] + difference * args["cond_scale"]
            return args[result]

        return function

    def unet_wrapper(apply_model: Any, args: Any) -> Any:
        note("model_function_wrapper", args["input"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    def conds(args: Any) -> Any:
        note("sampler_calc_cond_batch_function", args["input"])
        names = ("model", "conds", "input", "sigma", "model_options")
        return comfy.samplers.calc_cond_batch(*(args[name] for name in names))

    clone = model.clone()
    for place, index in (
        (WrappersMP.OUTER_SAMPLE, 0),
        (WrappersMP.SAMPLER_SAMPLE, 4),
        (WrappersMP.PREDICT_NOISE, 0),
        (WrappersMP.CALC_COND_BATCH, 2),
        (WrappersMP.APPLY_MODEL, 0),
        (WrappersMP.DIFFUSION_MODEL, 0),
    ):
        clone.add_wrapper_with_key(place, "spy", wrapper(place, index))
    clone.set_model_sampler_cfg_function(guidance("sampler_cfg_function", "cfg"))
    clone.set_model_sampler_pre_cfg_function(guidance("sampler_pre_cfg_function", "conds_out"))
    clone.set_model_sampler_post_cfg_function(guidance("sampler_post_cfg_function", "denoised"))
    clone.set_model_sampler_calc_cond_batch_function(conds)
    clone.set_model_unet_function_wrapper(unet_wrapper)
    return clone


@pytest.mark.parametrize("text_stream", ["own", "shared"])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_place_sees_one_streams_rows(
    silent: Any, model: Any, text_stream: str, rows: int
) -> None:
    """Where the number of the streams' rows changes in the middle of a run as well."""
    wanted: dict[str, set[int]] = {}
    plain = run(spied(model, wanted), rows=rows, steps=5)
    assert len(wanted) == 11
    times = {"start_percent": 0.3, "end_percent": 0.6}
    for order in (
        lambda seen: spied(silent(model, text_stream, **times), seen),
        lambda seen: silent(spied(model, seen), text_stream, **times),
    ):
        seen: dict[str, set[int]] = {}
        assert error(run(order(seen), rows=rows, steps=5), plain) < 1e-5
        assert seen == wanted


def test_model_wrapper_keeps_the_method(
    host: Any, model: Any, adapter: Any, identity: Any, pack: Any
) -> None:
    """Under a wrapper around the model the streams are called apart, and compute the same."""
    options = pack.infinite_id_core.method.attention.StreamOptions
    calls: list[int] = []

    def count(apply_model: Any, args: Any) -> Any:
        calls.append(args["input"].shape[0])
        return apply_model(args["input"], args["timestep"], **args["c"])

    for text_stream in ("own", "shared"):
        for mixing in ("mixed", "mutual", "off"):
            chosen = options(text_stream=text_stream, mixing=mixing)
            patched = host.apply_identity(model, adapter, identity, options=chosen)
            together = run(patched, rows=2)
            wrapped = patched.clone()
            wrapped.set_model_unet_function_wrapper(count)
            assert error(run(wrapped, rows=2), together) < 1e-5
    assert set(calls) == {4}  # positive and negative of one stream


@pytest.mark.parametrize("text_stream", ["own", "shared"])
def test_wrapper_that_a_cond_brings(silent: Any, model: Any, text_stream: str) -> None:
    """As a hook of the positive prompt: it is around that cond's calls only."""

    def seen(model: Any) -> tuple[torch.Tensor, set[int]]:
        found: set[int] = set()

        def wrap(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            found.add(x.shape[0])
            return executor(x, *args, **kwargs) * 1.05

        hook = comfy.hooks.TransformerOptionsHook(
            {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"spy": [wrap]}}},
            hook_scope=comfy.hooks.EnumHookScope.HookedOnly,
        )
        group = comfy.hooks.HookGroup()
        group.add(hook)
        positive = comfy.hooks.set_hooks_for_conditioning(conditioning(1), group)
        return run(model, positive=positive), found

    plain, wanted = seen(model)
    found, rows = seen(silent(model, text_stream))
    assert wanted == {2} and rows == wanted
    assert error(found, plain) < 1e-5 and error(plain, run(model)) > 1e-3


def test_wrapper_that_calls_again_is_refused(errors: Any, patched: Any, model: Any) -> None:
    def again(apply_model: Any, args: Any) -> Any:
        _Calls.made += 1  # a class belongs to both streams
        for _ in range(_Calls.made):
            out = apply_model(args["input"], args["timestep"], **args["c"])
        return out

    before = run(model)
    wrapped = patched.clone()
    wrapped.set_model_unet_function_wrapper(again)
    with pytest.raises(errors.PatchConflictError, match="more often"):
        run(wrapped)
    assert torch.equal(run(model), before)


class _Calls:
    made = 0


def test_wrapper_that_tiles(
    host: Any, errors: Any, model: Any, adapter: Any, identity: Any
) -> None:
    """One tile a call is fine; several in one call, and a mask under tiles, are refused by name."""

    def tiled(model: Any, together: bool) -> Any:
        def wrapper(apply_model: Any, args: Any) -> torch.Tensor:
            parts = args["input"].chunk(2, dim=-1)
            if not together:
                outs = [apply_model(part, args["timestep"], **args["c"]) for part in parts]
                return torch.cat(outs, dim=-1)
            c = {
                k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v
                for k, v in args["c"].items()
            }
            out = apply_model(torch.cat(parts), torch.cat([args["timestep"]] * 2), **c)
            return torch.cat(out.chunk(2), dim=-1)

        clone = model.clone()
        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    patched = host.apply_identity(model, adapter, identity)
    assert error(run(tiled(model, True)), run(tiled(model, False))) < 1e-5
    assert run(tiled(patched, False)).isfinite().all()
    with pytest.raises(errors.PatchConflictError, match="tile batch size"):
        run(tiled(patched, True))
    masked = host.apply_identity(model, adapter, identity, mask=torch.ones(1, 64, 64))
    with pytest.raises(errors.PatchConflictError, match="no mask"):
        run(tiled(masked, False))


def test_perp_neg_gives_the_empty_cond_nobody(host: Any, model: Any, patched: Any) -> None:
    """The deprecated node evaluates a cond that the guider does not know: no person in it."""
    roles: list[bool] = []
    before = host.SamplingRun.is_negative

    def noted(self: Any, index: int, conds: Any) -> bool:
        role = before(self, index, conds)
        if len(conds) == 1:
            roles.append(role)
        return role

    host.SamplingRun.is_negative = noted
    try:
        run(NODES["PerpNeg"](patched))
    finally:
        host.SamplingRun.is_negative = before
    assert roles and all(roles)


# --- the sampler's own noise -----------------------------------------------------------------


def test_callback_draws_for_itself(silent: Any, model: Any) -> None:
    """What runs in the callback gets its own draws: numbers, and another model's whole run."""
    whole = {"noise": torch.randn(4, 4, SIZE, SIZE, generator=_generator())}
    other = tiny_model(seed=4)
    wanted = run(other, "euler_ancestral", **whole)
    seen: list[Any] = []

    def callback(*_: Any) -> None:
        torch.manual_seed(1)
        drawn = torch.randn(4, 4, SIZE, SIZE)
        seen.append((drawn, run(other, "euler_ancestral", **whole)))

    run(silent(model), "euler_ancestral", rows=2, callback=callback)
    for drawn, picture in seen:
        assert not torch.equal(drawn[:2], drawn[2:])
        assert error(picture, wanted) < 1e-5


def test_sampler_in_a_thread_of_its_own(silent: Any, model: Any) -> None:
    """A sampler that evaluates the model in another thread than it draws in."""

    @torch.no_grad()
    def sampler(model: Any, x: Any, sigmas: Any, extra_args: Any = None, **_: Any) -> Any:
        for i in range(len(sigmas) - 1):
            out: list[Any] = []

            def evaluate(x: Any = x, sigma: Any = sigmas[i], out: list[Any] = out) -> None:
                with torch.inference_mode():
                    try:
                        out.append(model(x, sigma * x.new_ones([x.shape[0]]), **extra_args))
                    except BaseException as failure:  # noqa: BLE001 - shown below
                        out.append(failure)

            thread = threading.Thread(target=evaluate)
            thread.start()
            thread.join()
            if isinstance(out[0], BaseException):
                raise out[0]
            x = out[0] + sigmas[i + 1] * torch.randn_like(x)
        return x

    assert error(_sampled(silent(model), sampler), _sampled(model, sampler)) < 1e-5


def test_sampler_that_enlarges_the_latent(silent: Any, model: Any, patched: Any) -> None:
    sampler = _extra("nodes_advanced_samplers", "sample_lcm_upscale")

    def upscaled(model: Any) -> Any:
        return _sampled(model, sampler, total_upscale=2.0, upscale_steps=2)

    plain = upscaled(model)
    assert plain.shape[-1] == 2 * SIZE
    assert error(upscaled(silent(model)), plain) < 1e-5
    assert error(upscaled(patched), plain) > 1e-3


def _sampled(model: Any, function: Any, **options: Any) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(1), conditioning(2))
    guider.set_cfg(4.0)
    noise = torch.randn(2, 4, SIZE, SIZE, generator=_generator())
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 3)
    sampler = comfy.samplers.KSAMPLER(function, extra_options=options)
    torch.manual_seed(3)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=3)


def test_sampler_of_other_rows_is_refused(errors: Any, patched: Any) -> None:
    def sampler(model: Any, x: Any, sigmas: Any, extra_args: Any = None, **_: Any) -> Any:
        return torch.cat([model(row, sigmas[:1], **extra_args) for row in x.split(1)])

    with pytest.raises(errors.PatchConflictError, match="text_stream to shared"):
        _sampled(patched, sampler)


# --- one run over two samplers ---------------------------------------------------------------


@pytest.mark.parametrize("text_stream", ["own", "shared"])
@pytest.mark.parametrize("half", [False, True])
def test_split_run_equals_one(
    pack: Any, host: Any, model: Any, adapter: Any, identity: Any, text_stream: str, half: bool
) -> None:
    """KSampler (Advanced) twice: the second goes on with the text stream's own latent."""
    options = pack.infinite_id_core.method.attention.StreamOptions(text_stream=text_stream)
    patched = host.apply_identity(model, adapter, identity, options=options)
    whole = run(patched, steps=6)
    first = run(patched, steps=6, last_step=3)
    if half:  # as with --fp16-intermediates
        first = first.half().float()
    kept: dict[str, Any] = {"latent_image": first, "noise": torch.zeros_like(first)}
    second = run(patched, steps=6, start_step=3, **kept)
    assert error(second, whole) < (3e-3 if half else 1e-5)
    swapped: dict[str, Any] = {**kept, "latent_image": first.flip(0)}  # rows go where they belong
    assert error(run(patched, steps=6, start_step=3, **swapped).flip(0), second) < 1e-5


def test_unknown_latent_starts_from_the_person(host: Any, patched: Any, caplog: Any) -> None:
    known = torch.randn(2, 4, SIZE, SIZE, generator=_generator())
    run(patched, steps=6, start_step=3, latent_image=known, noise=torch.zeros_like(known))
    assert "is not known" in caplog.text


# --- context windows -------------------------------------------------------------------------


class Window:
    """Rows of the batch as today's host cuts them, whatever the host here: the anchor first."""

    dim = 0

    def __init__(self, index_list: list[int]) -> None:
        self.index_list = index_list
        self.causal_anchor_index = index_list[0] - 1

    def get_tensor(self, full: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        anchor = [self.causal_anchor_index] if self.causal_anchor_index >= 0 else []
        return full[[*anchor, *self.index_list]]


class AnchoredWindows:
    """A context handler with today's anchor row and shuffled noise, for every host."""

    dim = 0
    freenoise = True

    def should_use_context(self, *_: Any) -> bool:
        return True

    def execute(
        self, calc: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any
    ) -> list[torch.Tensor]:
        outs = [torch.zeros_like(x) for _ in conds]
        for window in (Window([0, 1]), Window([2, 3])):
            options["transformer_options"]["context_window"] = window
            parts = calc(model, conds, window.get_tensor(x), window.get_tensor(timestep), options)
            for out, part in zip(outs, parts, strict=True):
                out[window.index_list] = part[-len(window.index_list) :]
        return outs

    def _apply_freenoise(self, noise: torch.Tensor) -> torch.Tensor:
        return noise[[1, 0, 3, 2]]

    def on(self, model: Any) -> Any:
        """A clone that samples through this handler."""

        def shuffled(executor: Any, *args: Any, **kwargs: Any) -> Any:
            noise = self._apply_freenoise(args[4])
            return executor(*args[:4], noise, *args[5:], **kwargs)

        clone = model.clone()
        clone.model_options["context_handler"] = self
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "freenoise", shuffled)
        return clone


@pytest.mark.parametrize("text_stream", ["own", "shared"])
def test_anchored_windows_and_shuffled_noise(
    silent: Any, model: Any, pack: Any, host: Any, adapter: Any, identity: Any, text_stream: str
) -> None:
    noise = torch.randn(4, 4, SIZE, SIZE, generator=_generator())

    def seen(model: Any) -> torch.Tensor:
        return run(model, noise=noise.clone())

    windows = AnchoredWindows()
    plain = seen(windows.on(model))
    assert error(seen(windows.on(silent(model, text_stream))), plain) < 1e-5
    assert error(seen(silent(windows.on(model), text_stream)), plain) < 1e-5
    # Frame 2's mask acts in frame 2, and nowhere else.
    options = pack.infinite_id_core.method.attention.StreamOptions(text_stream=text_stream)
    one = torch.zeros(4, SIZE * 8, SIZE * 8)
    one[2] = 1
    masked = host.apply_identity(model, adapter, identity, options=options, mask=one)
    frames = [(seen(windows.on(masked)) - plain)[i].norm() for i in range(4)]
    assert frames[2] > 10 * max(frames[0], frames[1])


def windowed(model: Any, freenoise: bool = False, anchor: bool = True) -> Any:
    windows = importlib.import_module("comfy.context_windows")
    newer: dict[str, Any] = {}
    if hasattr(windows, "create_sampler_sample_wrapper"):
        newer = {"freenoise": freenoise, "causal_window_fix": anchor}
    handler = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("standard_static"),
        fuse_method=windows.get_matching_fuse_method("pyramid"),
        context_length=2,
        context_overlap=1,
        **newer,
    )
    clone = model.clone()
    clone.model_options["context_handler"] = handler
    if newer:
        windows.create_prepare_sampling_wrapper(clone)
        windows.create_sampler_sample_wrapper(clone)
    return clone


@pytest.mark.parametrize("freenoise", [False, True])
def test_context_windows(silent: Any, patched: Any, model: Any, freenoise: bool) -> None:
    noise = torch.randn(4, 4, SIZE, SIZE, generator=_generator())

    def seen(model: Any) -> torch.Tensor:
        return run(windowed(model, freenoise), noise=noise.clone())

    plain = seen(model)
    for stream in ("own", "shared"):
        assert error(seen(silent(model, stream)), plain) < 1e-5
        assert error(
            run(silent(windowed(model, freenoise), stream), noise=noise.clone()), plain
        ) < (1e-5)
    assert error(seen(patched), plain) > 1e-3


@pytest.mark.parametrize("text_stream", ["own", "shared"])
def test_masks_in_context_windows(
    pack: Any, host: Any, model: Any, adapter: Any, identity: Any, text_stream: str
) -> None:
    """A mask for each frame acts on its frame: complements add up, also with an anchor row."""
    options = pack.infinite_id_core.method.attention.StreamOptions(text_stream=text_stream)
    noise = torch.randn(4, 4, SIZE, SIZE, generator=_generator())
    masks = torch.rand(4, SIZE * 8, SIZE * 8, generator=_generator())

    def applied(model: Any, identity: Any, mask: Any = None) -> Any:
        return host.apply_identity(model, adapter, identity, options=options, mask=mask)

    whole = run(windowed(applied(model, identity)), noise=noise.clone())
    parts = applied(applied(model, identity, masks), identity, 1 - masks)
    assert error(run(windowed(parts), noise=noise.clone()), whole) < 1e-5
    alone = torch.zeros(4, SIZE * 8, SIZE * 8)
    alone[2] = 1  # the person is in frame 2; where no window overlap mixes frames, nowhere else
    other = applied(applied(model, identity, 1 - alone), tiny_identity(pack, seed=8), alone)
    difference = (run(windowed(other), noise=noise.clone()) - whole).flatten(1).norm(dim=1)
    assert int(difference.argmax()) == 2 and float(difference[2]) > 0
    assert float(difference[[0, 1, 3]].max()) < 1e-4 * float(difference[2])


def test_anchor_row_is_masked_as_its_frame(host: Any) -> None:
    """A window object of today's host, which the floor does not have: index list and anchor."""
    rows = importlib.import_module(host.__name__.rpartition(".")[0] + ".comfyui_rows")

    frames, window = torch.arange(5.0)[:, None, None], Window([2, 3])
    assert rows.in_window(frames, window, 5).flatten().tolist() == [1, 2, 3]
    assert rows.in_window(frames[:2], window, 5).flatten().tolist() == [1, 0, 1]  # repeated
    assert rows.in_window(frames[:1], window, 5) is not None


# --- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", [lambda m: m[0], lambda m: m[:, None], lambda m: m[..., None], lambda m: m > 0.5]
)
def test_masks_of_other_layouts(
    host: Any, model: Any, adapter: Any, identity: Any, layout: Any
) -> None:
    mask = torch.zeros(1, SIZE * 8, SIZE * 8)
    mask[..., : SIZE * 4] = 1
    wanted = run(host.apply_identity(model, adapter, identity, mask=mask))
    found = run(host.apply_identity(model, adapter, identity, mask=layout(mask)))
    assert error(found, wanted) < 1e-6


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 64, 64), "zero everywhere"),
        (torch.full((1, 8, 8), float("nan")), "not numbers"),
        (torch.full((1, 8, 8), float("inf")), "not numbers"),
        (torch.ones(1, 8, 8, 3), "batch, height, width"),
        (torch.ones(8), "batch, height, width"),
        (torch.ones(0, 8, 8), "batch, height, width"),
    ],
)
def test_masks_that_mean_nothing(
    host: Any, errors: Any, model: Any, adapter: Any, identity: Any, mask: Any, message: str
) -> None:
    with pytest.raises(errors.OptionError, match=message):
        host.apply_identity(model, adapter, identity, mask=mask)


@pytest.mark.parametrize("feature", ["face", "clip"])
def test_features_that_overflow_are_named(
    pack: Any, host: Any, errors: Any, model: Any, adapter: Any, feature: str
) -> None:
    import dataclasses

    identity = tiny_identity(pack)
    value = torch.full_like(identity[feature].value, 1e38)
    huge = dataclasses.replace(identity[feature], value=value)
    features = {**identity.features, feature: huge}
    patched = host.apply_identity(model, adapter, dataclasses.replace(identity, features=features))
    with pytest.raises(errors.FeatureError, match=f"{feature} 1e\\+38"):
        run(patched)
