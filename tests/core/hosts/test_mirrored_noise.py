"""Draws for the doubled latent, and for nothing else."""

from __future__ import annotations

import threading

import pytest
import torch

from infinite_id_core.hosts.mirrored_noise import MirroredNoise

SHAPE = (4, 3, 8, 8)
DRAWS = {
    "randn": lambda: torch.randn(SHAPE),
    "randn by size": lambda: torch.randn(size=SHAPE),
    "randn by numbers": lambda: torch.randn(*SHAPE),
    "rand": lambda: torch.rand(SHAPE),
    "randn_like": lambda: torch.randn_like(torch.empty(SHAPE)),
    "rand_like": lambda: torch.rand_like(torch.empty(SHAPE)),
    "normal_": lambda: torch.empty(SHAPE).normal_(),
    "uniform_": lambda: torch.empty(SHAPE).uniform_(),
    "randint": lambda: torch.randint(0, 1000, SHAPE),
    "randint_like": lambda: torch.randint_like(torch.empty(SHAPE), 1000),
    "normal by size": lambda: torch.normal(0.0, 1.0, SHAPE),
    "normal by means": lambda: torch.normal(torch.zeros(SHAPE), 1.0),
    "exponential_": lambda: torch.empty(SHAPE).exponential_(),
    "out": lambda: torch.randn(SHAPE, out=torch.zeros(SHAPE)),
    "a distribution": lambda: torch.distributions.Normal(torch.zeros(SHAPE), 2.0).sample(),
    "enlarged": lambda: torch.randn(4, 3, 16, 16),
    "enlarged like": lambda: torch.randn_like(torch.empty(4, 3, 12, 20)),
}


def halves_equal(x: torch.Tensor) -> bool:
    return torch.equal(*x.chunk(2))


@pytest.mark.parametrize("name", DRAWS)
def test_both_streams_get_the_draw_of_one(name: str):
    with MirroredNoise(SHAPE):
        torch.manual_seed(1)
        drawn = DRAWS[name]()
    assert halves_equal(drawn)
    torch.manual_seed(1)
    assert not halves_equal(DRAWS[name]())


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(2, 3, 8, 8),  # other rows
        lambda: torch.randn(4, 192),  # another rank
        lambda: torch.randn(4),
    ],
)
def test_other_draws_are_their_own(draw):
    torch.manual_seed(1)
    wanted = draw()
    with MirroredNoise(SHAPE):
        torch.manual_seed(1)
        assert torch.equal(draw(), wanted)


def test_paused_draws_are_their_own():
    noise = MirroredNoise(SHAPE)
    with noise:
        with noise.paused():
            assert not noise.active and not halves_equal(torch.randn(SHAPE))
        assert noise.active and halves_equal(torch.randn(SHAPE))
    assert not noise.active and not halves_equal(torch.randn(SHAPE))


def test_another_thread_is_left_alone():
    noise, found = MirroredNoise(SHAPE), []

    def work() -> None:
        with noise.paused():  # the model, called from a thread of the sampler's
            found.append((noise.active, halves_equal(torch.randn(SHAPE))))

    with noise:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found == [(False, False)]
        assert noise.active and halves_equal(torch.randn(SHAPE))


def test_error_leaves_nothing_on():
    noise = MirroredNoise(SHAPE)
    with pytest.raises(ZeroDivisionError), noise, noise.paused():
        raise ZeroDivisionError
    assert not noise.active and not halves_equal(torch.randn(SHAPE))


def test_what_is_drawn_into_is_filled():
    target = torch.zeros(SHAPE)
    with MirroredNoise(SHAPE):
        drawn = torch.randn(SHAPE, out=target)
    assert drawn is target and halves_equal(target) and float(target.abs().min()) > 0


def test_means_of_each_stream_over_one_draw():
    means = torch.cat([torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)])
    with MirroredNoise(SHAPE):
        zero, one = torch.normal(means, 1.0).chunk(2)
    assert torch.allclose(zero + 1, one, atol=1e-5)


def test_paused_under_another_mode_leaves_that_one():
    """A sampler that calls the model under a mode of its own (torch.device(...) is one)."""
    noise = MirroredNoise(SHAPE)
    with noise, torch.device("meta"):
        with noise.paused():
            assert torch.empty(1).device.type == "meta"
            assert not halves_equal(torch.randn(SHAPE, device="cpu"))
        assert torch.empty(1).device.type == "meta"
        assert halves_equal(torch.randn(SHAPE, device="cpu"))
    assert not noise.active
