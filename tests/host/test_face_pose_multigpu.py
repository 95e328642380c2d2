"""Face Pose where ComfyUI computes the positive and the negative on two GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nodes as host_nodes

from .face_pose import made_control_net, made_kit, photo
from .runs import SIZE, error, run
from .test_face_pose import seen_by
from .test_multigpu import SECOND, model, split, two_devices
from .tiny_sdxl import conditioning, latent

__all__ = ["model", "two_devices"]  # fixtures


@pytest.mark.parametrize("streams", ["without the person", "balanced", "one stream"])
def test_each_gpu_has_a_network_of_its_own(streams: str, pack: Any, model: Any) -> None:
    kit, net, picture = made_kit(pack, model), made_control_net(), photo()
    identity = kit.person(picture)[0]
    sides = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDFacePose"].execute(
        positive=conditioning(1), negative=conditioning(2), control_net=net, infinite_id=kit,
        identity=identity, pose=picture, latent={"samples": latent(2, SIZE)}, strength=0.8,
        start_percent=0.0, end_percent=1.0,
    ).args  # fmt: skip
    patched = model
    if streams != "without the person":
        options = pack.infinite_id_core.method.attention.STREAM_PRESETS[streams]
        apply = pack.infinite_id_core.hosts.comfyui.apply_identity
        patched = apply(model, kit.adapter, identity, options=options)
    on_one = run(patched, positive=sides[0], negative=sides[1])
    with seen_by(net) as seen:
        on_two = run(split(patched), positive=sides[0], negative=sides[1])
    assert error(on_two, on_one) < 1e-5
    control = sides[0][0][1]["control"]
    clone = control.get_instance_for_device(SECOND)
    assert clone is not control and clone.key == control.key
    assert clone.control.control_model is not net.control_model
    adapter = kit.adapter.adapter
    for wanted in (adapter.tokens(identity), adapter.null_tokens(identity)):
        calls = [rows for rows in seen if (rows.cpu() - wanted).abs().max() < 1e-5]
        assert len(calls) == 3  # one a step: the other side is the other GPU's
    assert len(seen) == 6 and torch.device("cpu") in {rows.device for rows in seen}
