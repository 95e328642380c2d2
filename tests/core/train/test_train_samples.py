"""What sample number n is depends on the seed and on n, and on nothing else."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infinite_id_core.errors import NotFiniteError, TruncatedFileError, WrongShapeError
from infinite_id_core.files.safetensors_file import read_header
from infinite_id_core.hosts.diffusers_sample import default_size_ids
from trainer.config import Data
from trainer.data_index import Dataset
from trainer.errors import DiskFullError, NoPairsError, ShardDamagedError
from trainer.files import LOCK
from trainer.train import cache as cache_module
from trainer.train.cache import FeatureCache, key_of
from trainer.train.crops import Crop, buckets, draw_crop, nearest_bucket
from trainer.train.draws import Purpose, generator
from trainer.train.features import compute_missing, fingerprints_of
from trainer.train.log import no_bar
from trainer.train.samples import Caches, Keys, Plan, Samples, Share, StepSampler, collate, loader

from .. import train_world


@pytest.fixture(scope="module")
def samples() -> Samples:
    config = train_world.config(train_world.shared())
    plan = Plan(config, Dataset(config.data.folder, config.filters), 4)
    keys = Keys(config=config, fingerprints=fingerprints_of(config))
    caches = Caches.below(config)
    compute_missing(plan, keys, caches, torch.device("cpu"), progress=no_bar)
    return Samples(plan, keys, caches)


# --- numbers ---------------------------------------------------------------------------------


def test_generators_are_their_counters() -> None:
    first = generator(1, 2, Purpose.NOISE).standard_normal(4)
    assert np.array_equal(generator(1, 2, Purpose.NOISE).standard_normal(4), first)
    others = [(2, 2, Purpose.NOISE), (1, 3, Purpose.NOISE), (1, 2, Purpose.CROP)]
    assert all(not np.array_equal(generator(*o).standard_normal(4), first) for o in others)


def test_shares_partition_each_step_whatever_the_number_of_processes() -> None:
    whole = [n for part in Share(batch=12, accumulation=1).numbers(5) for n in part]
    assert whole == list(range(60, 72))
    for batch, accumulation, world in ((3, 2, 2), (1, 4, 3), (6, 1, 2)):
        shares = [
            Share(batch=batch, accumulation=accumulation, rank=rank, world=world)
            for rank in range(world)
        ]
        found = [n for share in shares for part in share.numbers(5) for n in part]
        assert sorted(found) == whole
        sampler = StepSampler(shares[0], 5, 7)
        assert len(list(sampler)) == len(sampler) == 2 * accumulation


def test_the_loader_gives_the_same_with_any_number_of_workers(samples: Samples) -> None:
    share = Share(batch=2, accumulation=2)
    runs = [list(loader(samples, share, 3, 6, workers)) for workers in (0, 1, 3)]
    assert [batch["number"].tolist() for batch in runs[0]][:2] == [[12, 13], [14, 15]]
    for run in runs[1:]:
        for batch, wanted in zip(run, runs[0], strict=True):
            assert set(batch) == set(wanted)
            assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_a_sample_is_two_photos_of_one_person(samples: Samples) -> None:
    plan, dataset = samples.plan, samples.plan.dataset
    for number in range(200):
        choice = plan.choice(number)
        assert choice.reference != choice.target
        names = {dataset.row(row).identity for row in (choice.reference, choice.target)}
        assert names == {choice.identity}
        assert choice == plan.choice(number)


def test_draws_have_the_right_shares(samples: Samples) -> None:
    choices = [samples.plan.choice(number) for number in range(2000)]
    assert sum(c.drop_identity for c in choices) / 2000 == pytest.approx(0.1, abs=0.025)
    times = np.array([c.timestep for c in choices])
    assert times.min() >= 0
    assert times.max() <= 999
    assert np.histogram(times, 4, (0, 1000))[0] / 2000 == pytest.approx([0.25] * 4, abs=0.04)
    people = np.unique([c.identity for c in choices], return_counts=True)[1] / 2000
    assert people == pytest.approx([0.2] * 5, abs=0.04)
    assert {c.crop for c in choices} == {0, 1}


def test_samples_of_one_step_have_one_size_and_all_sizes_come_up(samples: Samples) -> None:
    shapes = []
    for step in range(30):
        batch = collate([samples[n] for n in range(4 * step, 4 * step + 4)])
        assert batch["latent"].shape == batch["noise"].shape
        shapes.append(tuple(batch["latent"].shape[-2:]))
        target = batch["size_ids"][:, 4:]
        assert (target == torch.tensor([8.0 * s for s in shapes[-1]])).all()
    assert len(set(shapes)) == 3


def test_the_null_identity_is_zeros_before_the_mappers(samples: Samples) -> None:
    dropped = [n for n in range(100) if samples.plan.choice(n).drop_identity]
    kept = [n for n in range(100) if n not in dropped]
    assert dropped
    for number in dropped[:3]:
        assert not samples[number]["face"].any()
        assert not samples[number]["clip"].any()
    face = samples[kept[0]]["face"]
    assert float(face.norm()) == pytest.approx(1.0, abs=1e-5)
    assert samples[kept[0]]["clip"].any()


def test_the_face_bell_stands_over_the_face(samples: Samples) -> None:
    assert "face_bell" not in samples[0]
    config = samples.plan.config
    weighted = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, face_weight=4.0)
    )
    plan = Plan(weighted, samples.plan.dataset, 4)
    for number in range(8):
        sample = Samples(plan, samples.keys, samples.caches)[number]
        choice = plan.choice(number)
        crop = plan.crop(choice.target, choice.crop)
        points = crop.inside(np.asarray(plan.dataset.row(choice.target).landmarks))
        x, y = (points[:2].mean(axis=0) + points[3:].mean(axis=0)) / 16  # latent pixels
        bell = sample["face_bell"][0]
        assert bell.shape == sample["latent"].shape[-2:]
        row, column = divmod(int(bell.argmax()), bell.shape[1])
        assert abs(row + 0.5 - y) <= 0.51
        assert abs(column + 0.5 - x) <= 0.51


def test_noise_is_unit_and_the_offset_is_shared_by_a_channel(samples: Samples) -> None:
    plan = samples.plan
    noise = torch.stack([plan.noise(n).flatten()[:200] for n in range(200)])
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.03)
    objective = dataclasses.replace(plan.config.objective, noise_offset=0.5)
    shifted = Plan(dataclasses.replace(plan.config, objective=objective), plan.dataset, 4)
    shift = shifted.noise(3) - plan.noise(3)
    assert float(shift.abs().max()) > 0.01
    torch.testing.assert_close(shift.std(dim=(1, 2)), torch.zeros(4), rtol=0, atol=1e-6)


def test_no_pair_at_all_is_named(samples: Samples) -> None:
    config = samples.plan.config
    filters = dataclasses.replace(config.filters, min_pair_cosine=0.99)
    dataset = Dataset(config.data.folder, filters)
    plan = Plan(dataclasses.replace(config, filters=filters), dataset, 4)
    with pytest.raises(NoPairsError, match="between 0.99 and 1.0 alike"):
        plan.choice(0)


# --- crops -----------------------------------------------------------------------------------


def data(**options: Any) -> Data:
    return Data(folder="x", **{"resolution": 512, **options})


def test_buckets_have_one_area_and_whole_steps() -> None:
    found = buckets(data(max_aspect=2.0))
    assert (512, 512) in found
    assert (704, 384) in found
    for height, width in found:
        assert height % 64 == width % 64 == 0
        assert max(height, width) / min(height, width) <= 2.0
        assert height * width / 512**2 == pytest.approx(1.0, abs=0.15)
    assert buckets(data(max_aspect=1.0)) == ((512, 512),)
    assert found[nearest_bucket(1000, 1000, found)] == (512, 512)
    assert found[nearest_bucket(800, 1500, found)][0] > 512


def row(dataset: Dataset, **values: Any) -> Any:
    return dataclasses.replace(dataset.row(0), **values)


def test_crops_hold_the_face_and_vary_its_share(samples: Samples) -> None:
    large = row(samples.plan.dataset, width=3000, height=2000, box=(1400.0, 600.0, 1700.0, 1000.0))
    options = data(min_face=0.2, max_face=0.7)
    shares = []
    for number in range(300):
        crop = draw_crop(large, (512, 512), options, generator(0, number, Purpose.CROP))
        assert crop.left <= 1400
        assert crop.left + crop.width >= 1700
        assert crop.top <= 600
        assert crop.top + crop.height >= 1000
        assert crop.left >= 0
        assert crop.left + crop.width <= 3000
        assert crop.top + crop.height <= 2000
        assert crop.width == pytest.approx(crop.height, abs=1)
        shares.append(400 / crop.height)
    assert min(shares) == pytest.approx(0.2, abs=0.02)
    assert max(shares) == pytest.approx(0.7, abs=0.02)
    assert np.median(shares) == pytest.approx((0.2 * 0.7) ** 0.5, abs=0.05)


def test_small_photos_are_cut_as_well_as_they_can_be(samples: Samples) -> None:
    small = row(samples.plan.dataset, width=300, height=200, box=(10.0, 5.0, 290.0, 195.0))
    for bucket in ((512, 512), (768, 384), (384, 768)):
        crop = draw_crop(small, bucket, data(), generator(0, 1, Purpose.CROP))
        assert crop.left + crop.width <= 300
        assert crop.top + crop.height <= 200
        assert crop.width / crop.height == pytest.approx(bucket[1] / bucket[0], rel=0.02)


def test_size_ids_are_those_of_the_photo_scaled_then_cropped() -> None:
    crop = Crop(left=300, top=100, width=800, height=400, bucket=(512, 1024), photo=(1000, 2000))
    assert crop.size_ids == (1000, 2000, 128, 384, 512, 1024)
    whole = Crop(left=0, top=0, width=512, height=512, bucket=(512, 512), photo=(512, 512))
    assert whole.size_ids == default_size_ids(torch.zeros(1, 4, 64, 64))


def test_a_target_is_what_the_crop_says(samples: Samples) -> None:
    plan = samples.plan
    photo = plan.dataset.photo(0)
    crop = plan.crop(0, 1)
    picture = crop.cut(photo)
    assert picture.size == (crop.bucket[1], crop.bucket[0])
    window = photo.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    again = np.asarray(window.resize(picture.size), dtype=float)
    assert np.abs(np.asarray(picture, dtype=float) - again).mean() < 8


# --- caches ----------------------------------------------------------------------------------


def test_caches_hold_what_the_encoders_say(samples: Samples) -> None:
    from trainer.models.vae import load_vae

    plan, keys = samples.plan, samples.keys
    crops = [plan.crop(2, which) for which in range(2)]
    pixels = torch.stack(
        [
            torch.from_numpy(np.asarray(c.cut(plan.dataset.photo(2)), dtype=np.float32) / 255)
            for c in crops
        ]
    ).permute(0, 3, 1, 2)
    wanted = load_vae("microworld").encode(pixels).half()
    for crop, latent in zip(crops, wanted, strict=True):
        found = samples.caches.latents.read(keys.latent(plan.dataset.row(2), crop))
        torch.testing.assert_close(found, latent, rtol=1e-2, atol=1e-3)
    assert samples.caches.clip.read(keys.clip(plan.dataset.row(2))).shape == (257, 96)


def test_nothing_is_computed_twice(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any) -> None:
        raise AssertionError("an encoder was loaded")

    for name in ("load_vae", "load_image_encoder"):
        monkeypatch.setattr(f"trainer.train.features.{name}", explode)
    made = compute_missing(
        samples.plan, samples.keys, Caches.below(samples.plan.config), torch.device("cpu"),
        progress=no_bar,
    )  # fmt: skip
    assert made == 0


def test_an_entry_stays_as_it_was_first_written(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.write({"a": torch.zeros(3)})
    cache.write({"a": torch.ones(3), "b": torch.ones(3)})
    cache.write({"b": torch.zeros(3)})
    for found in (cache, FeatureCache(tmp_path)):
        assert torch.equal(found.read("a"), torch.zeros(3))
        assert torch.equal(found.read("b"), torch.ones(3))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_another_model_or_option_asks_for_other_entries(samples: Samples) -> None:
    keys, first = samples.keys, samples.plan.dataset.row(0)
    other = dataclasses.replace(
        keys, fingerprints=dataclasses.replace(keys.fingerprints, vae="x", clip="y")
    )
    crop = samples.plan.crop(0, 0)
    assert keys.latent(first, crop) != other.latent(first, crop)
    assert keys.clip(first) != other.clip(first)
    wider = dataclasses.replace(keys.config.encoder, padding=0.5)
    padded = dataclasses.replace(keys, config=dataclasses.replace(keys.config, encoder=wider))
    assert keys.clip(first) != padded.clip(first)
    changed = dataclasses.replace(first, sha256="0" * 64)
    assert keys.clip(first) != keys.clip(changed)


def test_a_damaged_pack_is_computed_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.write({"a": torch.ones(3), "b": torch.zeros(2)})
    cache.write({"c": torch.full((2,), 5.0)})
    assert torch.equal(pickle.loads(pickle.dumps(cache)).read("c"), torch.full((2,), 5.0))
    damaged = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-4])
    again = FeatureCache(tmp_path)
    assert again.missing(["a", "c", "a", "b"]) == ["a", "b"]
    other = FeatureCache(tmp_path)
    other.write({"a": torch.ones(1)})
    assert not damaged.exists()
    again.refresh()
    assert again.missing(["a"]) == []


def test_a_pack_that_is_cut_while_it_is_read_has_a_name(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.write({"a": torch.ones(2**16), "b": torch.ones(2**16)})
    cache.read("a")
    (pack,) = tmp_path.glob("*.safetensors")
    with pack.open("r+b") as file:  # as another program might, in place
        file.truncate(2**12)
    with pytest.raises(TruncatedFileError, match="was cut while it was read"):
        cache.read("b")


def test_a_forked_reader_has_places_of_its_own_in_the_files(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.write({str(n): torch.full((2**14,), float(n)) for n in range(40)})
    cache.read("0")
    handle = next(iter(cache._open.values()))[1]
    monkey = cache.__dict__
    monkey["_process"] = -1  # as a child sees it
    assert torch.equal(cache.read("1"), torch.ones(2**14))
    assert next(iter(cache._open.values()))[1] is not handle


def test_an_entry_of_another_shape_is_named(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.write({"a": torch.ones(4, 8, 8)})
    assert cache.read("a", (4, None, 8)).shape == (4, 8, 8)
    for shape in ((4, 8, 16), (4, 8), (None, None, None, None)):
        with pytest.raises(WrongShapeError, match="run the same command again"):
            cache.read("a", shape)


def test_a_latent_of_another_size_gives_its_name_and_not_a_traceback(samples: Samples) -> None:
    choice = samples.plan.choice(0)
    key = samples.keys.latent(
        samples.plan.dataset.row(choice.target), samples.plan.crop(choice.target, choice.crop)
    )
    path = samples.caches.latents._packs[key]
    kept = path.read_bytes()
    try:
        tensors = {name: torch.zeros(4, 3, 3) for name in load_file(path)}
        save_file(tensors, path)
        other = Samples(samples.plan, samples.keys, Caches.below(samples.plan.config))
        assert isinstance(other[0]["error"], WrongShapeError)
    finally:
        path.write_bytes(kept)


def test_a_full_disk_leaves_no_half_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(DiskFullError):
        FeatureCache(tmp_path).write({"a": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_written(tmp_path: Path, value: float) -> None:
    cache = FeatureCache(tmp_path)
    with pytest.raises(NotFiniteError, match="not written"):
        cache.write({"a": torch.ones(1), "b": torch.tensor([0.0, value])})
    assert list(tmp_path.iterdir()) == [] and cache.missing(["a"]) == ["a"]


def test_of_two_trainings_the_first_ones_entry_stays(tmp_path: Path) -> None:
    first, second = FeatureCache(tmp_path), FeatureCache(tmp_path)
    first.write({"a": torch.ones(1), "b": torch.ones(1)})
    second.write({"b": torch.full((1,), 2.0), "c": torch.full((1,), 2.0)})
    for cache in (second, FeatureCache(tmp_path), pickle.loads(pickle.dumps(second))):
        assert [float(cache.read(key)) for key in "abc"] == [1.0, 1.0, 2.0]


def test_two_processes_that_fill_one_cache_write_each_entry_once(tmp_path: Path) -> None:
    words = [sys.executable, "-c", _FILLER, str(tmp_path)]
    fillers = [
        subprocess.Popen([*words, str(number)], cwd=train_world.ROOT, stdout=subprocess.PIPE)
        for number in (2, 3)
    ]
    said = [json.loads(filler.communicate(timeout=120)[0]) for filler in fillers]
    entries = [key for path in tmp_path.glob("*.safetensors") for key in read_header(path).tensors]
    assert sorted(entries) == sorted(str(n) for n in range(240))
    cache = FeatureCache(tmp_path)
    assert said[0] == said[1] == [float(cache.read(str(n))) for n in range(240)]


# Packs of so many entries, which the other process computes with other bits.
_FILLER = """
import json, sys
import torch
from trainer.train.cache import FeatureCache
folder, number = sys.argv[1], int(sys.argv[2])
cache = FeatureCache(folder)
for start in range(0, 240, number):
    cache.write({str(n): torch.full((1,), float(number)) for n in range(start, start + number)})
print(json.dumps([float(cache.read(str(n))) for n in range(240)]))
"""


def test_keys_are_hashes_of_plain_values() -> None:
    assert key_of("a", 1) == key_of("a", 1)
    assert len({key_of("a", 1), key_of("a", 2), key_of("a", "1"), key_of("b", 1)}) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named(tmp_path: Path, workers: int) -> None:
    root = train_world.world(tmp_path)
    shard = root / "data" / "shards" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    config = train_world.config(root, data={"workers": workers})
    plan = Plan(config, Dataset(config.data.folder, config.filters), 4)
    keys = Keys(config=config, fingerprints=fingerprints_of(config))
    with pytest.raises(ShardDamagedError, match=r"00000\.tar: .*ends before"):
        compute_missing(plan, keys, Caches.below(config), torch.device("cpu"), progress=no_bar)
