"""NaN and infinity are found wherever they stand, as torch's own ``isfinite`` finds them."""

from __future__ import annotations

import pytest
import torch

from infinite_id_core.files.safetensors_file import all_finite

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BAD = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 1, 2**18 - 1, 2**18, 2**18 + 6])
def test_one_bad_number_among_many(dtype: torch.dtype, bad: float, place: int) -> None:
    numbers = torch.zeros(2**18 + 7, dtype=dtype)
    assert all_finite(numbers)
    numbers[place] = bad
    assert not all_finite(numbers)


@pytest.mark.parametrize("dtype", FLOATS)
def test_extremes_are_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal
    assert all_finite(torch.tensor([info.max, info.min, smallest, smallest / 2, -0.0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pattern_of_16_bits_is_judged_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every.isfinite()
    assert all_finite(every[finite])
    assert not any(all_finite(every[i : i + 1]) for i in (~finite).nonzero().flatten().tolist())


def test_any_layout_and_type() -> None:
    x = torch.zeros(4, 6)
    x[1, 3] = torch.nan
    assert not all_finite(x.T) and not all_finite(x[:, 3]) and all_finite(x[:, ::2])
    assert all_finite(torch.zeros(0)) and all_finite(torch.tensor(1.0).half())
    assert all_finite(torch.tensor([True])) and all_finite(torch.tensor([2**40]))
    assert not all_finite(torch.tensor([complex(1, torch.inf)]))
    assert not all_finite(torch.tensor([0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn))
    assert not all_finite(torch.zeros(3, requires_grad=True) + torch.inf)
