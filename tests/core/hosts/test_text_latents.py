"""The text stream's latents between two samplers."""

from __future__ import annotations

import torch

from infinite_id_core.hosts.text_latents import TextLatents


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_found_by_content_row_by_row():
    latents, identity, text = TextLatents(), rows(3, 1), rows(3, 2)
    latents.keep(identity, text)
    for order in ([2, 0], [1], [0, 1, 2]):
        assert torch.equal(latents.find(identity[order]), text[order])
    assert torch.equal(latents.find(identity.half().float()), text)  # the host may cast between


def test_changed_rows_are_not_known():
    latents, identity = TextLatents(), rows(2, 1)
    latents.keep(identity, rows(2, 2))
    assert latents.find(identity * 1.01) is None
    assert latents.find(torch.cat([identity, rows(1, 3)])) is None
    assert latents.find(identity.reshape(2, 4, 4, 16)) is None
    assert TextLatents().find(identity) is None


def test_the_oldest_go_when_there_is_no_room():
    room = 3 * rows(1, 0).nbytes
    latents = TextLatents(room)
    for seed in range(5):
        latents.keep(rows(1, seed), rows(1, 100 + seed))
    assert [latents.find(rows(1, seed)) is not None for seed in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    latents.keep(rows(1, 2), rows(1, 7))  # the newest of the same name counts
    assert torch.equal(latents.find(rows(1, 2)), rows(1, 7))


def test_what_is_kept_does_not_change_with_the_sampler():
    latents, identity, text = TextLatents(), rows(1, 1), rows(1, 2)
    latents.keep(identity, text)
    before = text.clone()
    text.zero_()
    assert torch.equal(latents.find(identity), before)
