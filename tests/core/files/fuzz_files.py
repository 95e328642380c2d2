"""Mutated adapters, identities, pickles, tars and indexes: only named errors, nothing invalid in.

    python tests/core/files/fuzz_files.py --count 10000 --seed 0

The same seed gives the same files. What is refused must be refused by a class of this project;
what is accepted must be sound by another reader's word: safetensors' own, torch's
``weights_only``, the hash of the photo. An audit hook sees whether anything of a file runs.
Prints the worst time and memory of one file by kind, and exits with 1 where something was wrong,
or where one file took so long that it may never have ended: its number and the place are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import math
import pickle
import random
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
for place in (str(ROOT), str(Path(__file__).parent)):
    if place not in sys.path:
        sys.path.append(place)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from safetensors.torch import save as safetensors_saved  # noqa: E402

from infinite_id_core.errors import InfiniteIDError  # noqa: E402
from infinite_id_core.files import adapters, identities  # noqa: E402
from infinite_id_core.files.adapter_options import AdapterOptions  # noqa: E402
from infinite_id_core.sdxl import layers  # noqa: E402
from tests.core import hostile_files, published_files  # noqa: E402
from trainer import index_file, inspect  # noqa: E402
from trainer.convert import convert  # noqa: E402
from trainer.data_index import Dataset, Filters  # noqa: E402
from trainer.errors import FilterError  # noqa: E402
from trainer.index_file import INDEX, DatasetInfo  # noqa: E402
from trainer.prepare.photo import PhotoError, open_photo  # noqa: E402
from trainer.prepare.reading import read_blob, read_sidecars  # noqa: E402
from trainer.prepare.tar_sources import list_tar  # noqa: E402
from trainer.shards import ShardWriter, is_shard_name  # noqa: E402

SECONDS = 20.0  # for one file; the sound ones take milliseconds
HUNG = 120.0  # by the clock
KILOBYTES = 400_000  # that one file may add to the memory's peak
OPEN = Filters(
    min_short_side=0, min_face_size=0, min_det_score=0, min_similarity=-1, min_sharpness=0,
    min_photos=1,
)  # fmt: skip
_EDGES = (0, 1, 2, 7, 8, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1,
          2**63, 2**64 - 1)  # fmt: skip
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
         "socket.connect", "ctypes.dlopen")  # fmt: skip


# --- mutations -------------------------------------------------------------------------------


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few changes of the kinds that find faults: bits, numbers at edges, cuts, moved pieces."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        if not out:
            break
        at = chance.randrange(len(out))
        # Headers are where the decisions are made: half of the changes go there.
        if chance.random() < 0.5:
            at = min(at, chance.randrange(1 + min(len(out) - 1, 2048)))
        span = chance.choice((1, 2, 4, 8, 64, 512))
        kind = chance.randrange(8)
        if kind == 0:
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            out[at : at + span] = chance.randbytes(span)
        elif kind == 2:
            number = chance.choice(_EDGES)
            width = chance.choice((1, 2, 4, 8))
            order = chance.choice(("little", "big"))
            out[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, order)
        elif kind == 3:
            del out[at : at + span]
        elif kind == 4:
            out[at:at] = chance.randbytes(span)
        elif kind == 5:
            other = chance.randrange(len(out))
            out[at : at + span] = out[other : other + span]
        elif kind == 6:
            del out[chance.randrange(len(out)) :]
        else:
            out[at:at] = out[at : at + span] * chance.choice((1, 2, 16))
    return bytes(out)


def _value(chance: random.Random) -> Any:
    """Something that stands where another thing was expected."""
    return chance.choice(
        (None, True, False, 0, 1, -1, 2**31, 2**63, 2**80, -(2**63), 0.5, float("nan"), "", "x",
         "../x", "/etc/passwd", "a\0b", "\ud800", "F16", "F32", "BF16", "F64", "I64", [], [[]],
         [0, 0], [2**40], [1] * 9, {}, {"a": 1}, "[" * 2000)
    )  # fmt: skip


def changed(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """A JSON value with one entry, somewhere in it, replaced, dropped, doubled or renamed."""
    if isinstance(value, dict) and value and (depth < 1 or chance.random() < 0.8):
        result = dict(value)
        key = chance.choice(list(value))
        action = chance.randrange(6)
        if action == 0:
            del result[key]
        elif action == 1:
            result[key] = _value(chance)
        elif action == 2:
            result[str(_value(chance))] = result.pop(key)
        elif action == 3:
            result[chance.choice(list(value))] = result[key]
        else:
            result[key] = changed(value[key], chance, depth + 1)
        return result
    if isinstance(value, list) and value and chance.random() < 0.8:
        result = list(value)
        result[chance.randrange(len(value))] = changed(chance.choice(value), chance, depth + 1)
        return result
    if isinstance(value, str) and value.startswith("{") and chance.random() < 0.8:
        return json.dumps(changed(json.loads(value), chance, depth + 1))
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.6:
        return value + chance.choice((-1, 1, 8, -8, 2**20))
    return _value(chance)


# --- the kinds -------------------------------------------------------------------------------


class Fault(Exception):
    """What must not happen, happened."""


def expect(good: bool, problem: str) -> None:
    """Raise ``Fault`` unless ``good``."""
    if not good:
        raise Fault(problem)


def safetensors_bytes(kind: str, chance: random.Random) -> bytes:
    """An adapter or identity with a changed header, changed bytes, or both."""
    file = hostile_files.SOUND[kind]()
    header: bytes | None = None
    if chance.random() < 0.6:
        value = changed(file.header(), chance)
        header = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "replace")
    data = file.bytes(header)
    return mutated(data, chance) if header is None or chance.random() < 0.3 else data


def _accepted_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    known = load_file(path)
    expect(set(known) == set(tensors), "other tensors than safetensors reads")
    for name, tensor in tensors.items():
        expect(bool(tensor.isfinite().all()), f"{name} is not finite")
        expect(tensor.shape == known[name].shape, f"{name} has another shape")
        expect(torch.equal(tensor.float(), known[name].float()), f"{name} has other numbers")


def try_adapter(path: Path, chance: random.Random) -> None:
    """Read, compare with safetensors' own reader, and build the module."""
    path.write_bytes(safetensors_bytes("adapter", chance))
    adapter = adapters.read_adapter(path)
    _accepted_tensors(path, dict(adapter.state_dict()))
    expect(adapter.config.clip_width == adapter.state_dict()["clip_mapper.proj_in.weight"].shape[1],
           "the configuration is not that of the tensors")  # fmt: skip


def try_identity(path: Path, chance: random.Random) -> None:
    """Read and compare with safetensors' own reader."""
    path.write_bytes(safetensors_bytes("identity", chance))
    read = identities.read_identity(path)
    _accepted_tensors(
        path, {"face": read["face"].value, "clip": read["clip"].value, "weight": read.weight}
    )
    expect(bool((read.weight > 0).all()), "a weight is not positive")


def try_features(path: Path, chance: random.Random) -> None:
    """The same for version 2 of an identity file."""
    path.write_bytes(safetensors_bytes("features", chance))
    read = identities.read_identity(path)
    tensors = {"weight": read.weight}
    for name, feature in read.features.items():
        tensors[f"{name}.value"] = feature.value
        if feature.null is not None:
            tensors[f"{name}.null"] = feature.null
        expect(feature.value.shape[1:] == feature.reading.shape, f"{name} is of another shape")
    _accepted_tensors(path, tensors)
    expect(bool((read.weight > 0).all()), "a weight is not positive")


class Harm:
    """Unpickled by a reader that calls things, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {m.filename: archive.read(m) for m in archive.infolist()}


def pickle_bytes(chance: random.Random, harm: Path) -> bytes:
    """A saved file, old or new, with its opcodes, its archive or anything else changed."""
    base = torch.arange(12.0)
    values: dict[str, Any] = {
        "image_proj": {"proj.weight": base.view(3, 4).t(), "norm.weight": base[2:6]},
        "ip_adapter": {f"{n}.to_k_ip.weight": torch.randn(4, 3) for n in (1, 3)},
        "config": {"a": [1, 2.5, None, True], "step": 7},
    }
    if chance.random() < 0.3:
        values["ip_adapter"]["x"] = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    if chance.random() < 0.2:
        values["more"] = Harm(harm)
    return _saved(values, chance)


def _saved(values: Any, chance: random.Random) -> bytes:
    """A changed file that ``torch.save`` wrote."""
    out = io.BytesIO()
    zipped = chance.random() < 0.7
    torch.save(values, out, _use_new_zipfile_serialization=zipped)
    data = out.getvalue()
    if not zipped or chance.random() < 0.2:
        return mutated(data, chance)
    members = _members(data)
    name = chance.choice([m for m in members if m.endswith((".pkl", "/0", "/1"))])
    name = next(m for m in members if m.endswith(".pkl")) if chance.random() < 0.7 else name
    members[name] = mutated(members[name], chance)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return packed.getvalue()


def try_pickle(path: Path, chance: random.Random) -> None:
    """Convert, and compare with what torch's restricted reader builds."""
    harm = path.with_name("harm")
    path.write_bytes(pickle_bytes(chance, harm))
    output = path.with_name("converted.safetensors")
    output.unlink(missing_ok=True)
    try:
        found = convert(path, output)
    except InfiniteIDError:
        expect(not output.exists(), "a refused pickle left a file")
        raise
    finally:
        expect(not harm.exists(), "something of the pickle ran")
    written = load_file(output)
    expect(bool(written) and set(written) == set(found.tensors), "other tensors than were found")
    try:
        known = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, TypeError, KeyError, ValueError, AttributeError,
            EOFError, IndexError, OSError, struct.error):  # fmt: skip
        return  # torch is stricter about what is not a tensor's
    flat = {
        f"{prefix}.{name}": tensor
        for prefix in ("image_proj", "ip_adapter")
        for name, tensor in (known.get(prefix) or {}).items()
        if isinstance(tensor, torch.Tensor)
    }
    for name in flat.keys() & written.keys():
        tensor = flat[name].detach()
        expect(written[name].shape == tensor.shape, f"{name} has another shape than torch's")
        expect(torch.equal(written[name].float(), tensor.float()), f"{name} differs from torch's")


PUBLISHED = published_files.Sizes(
    layers=published_files.SMALL.layers[:2], context=8, width=8, heads=1, face_heads=1, tokens=2,
    face_hidden=8, rank=1, states=16, pulid=8, former_heads=1, former_tokens=2, eva=4, level=4,
)  # fmt: skip
PUBLISHED_OPTIONS = AdapterOptions(
    layers=published_files.layers_of(PUBLISHED, layers), image_encoder="made-H"
)


def _altered(made: dict[str, Any], chance: random.Random) -> None:
    """One tensor dropped, renamed, or of another shape or type; the file itself stays sound."""
    group = made[chance.choice(list(made))]
    name = chance.choice(list(group))
    tensor = group.pop(name)
    way = chance.randrange(5)
    if way == 1:
        parts = name.split(".")
        at = chance.randrange(len(parts))
        parts[at] = chance.choice(("0", "1", "2", "99", "weight", "", "proj", "latents", "a" * 300))
        group[".".join(parts)] = tensor
    elif way == 2:
        shape = [chance.choice((n, n, n + 1, 1, 0, 2 * n, 64)) for n in tensor.shape]
        group[name] = torch.ones(shape, dtype=tensor.dtype)
    elif way == 3:
        group[name] = tensor[None] if chance.random() < 0.5 else tensor.reshape(-1)
    elif way == 4:
        group[name] = tensor.to(chance.choice((torch.int64, torch.float64, torch.bool)))


def published_bytes(family: str, chance: random.Random, harm: Path) -> bytes:
    """A published adapter, in safetensors or a pickle, with anything changed."""
    made = published_files.made(family, PUBLISHED, dtype=torch.float16)
    if chance.random() < 0.4:
        for _ in range(chance.choice((1, 1, 2, 5))):
            _altered(made, chance)
        out = io.BytesIO()
        torch.save(made, out)
        return out.getvalue()
    if chance.random() < 0.5:
        values: dict[str, Any] = dict(made)
        if chance.random() < 0.2:
            values["more"] = Harm(harm)
        return _saved(values, chance)
    data = safetensors_saved(published_files.flat(**made))
    size = int.from_bytes(data[:8], "little")
    if chance.random() < 0.4:
        return mutated(data, chance)
    header = json.dumps(changed(json.loads(data[8 : 8 + size]), chance)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def try_published(path: Path, chance: random.Random) -> None:
    """Read, and compare with safetensors' or torch's own reader."""
    harm = path.with_name("harm")
    families = ("base H", "full", "plus", "faceid", "plus v2", "pulid v1", "pulid v1.1")
    path.write_bytes(published_bytes(chance.choice(families), chance, harm))
    try:
        adapter = adapters.read_adapter(path, options=PUBLISHED_OPTIONS)
    finally:
        expect(not harm.exists(), "something of the file ran")
    try:
        known = (
            load_file(path)
            if path.read_bytes()[8:9] == b"{"
            else published_files.flat(
                **{
                    n: v
                    for n, v in torch.load(path, weights_only=True).items()
                    if isinstance(v, dict)
                }
            )
        )
    except (pickle.UnpicklingError, RuntimeError, TypeError, KeyError, ValueError, AttributeError,
            EOFError, IndexError, OSError, struct.error):  # fmt: skip
        known = {}  # torch is stricter about what is not a tensor's
    for name, tensor in adapter.state_dict().items():
        expect(bool(tensor.isfinite().all()), f"{name} is not finite")
        if name in known:
            expect(torch.equal(tensor, known[name]), f"{name} has other numbers")
    expect(len(adapter.widths) == 2, "other layers than the UNet has")


def photo_bytes(number: int) -> bytes:
    """A tiny PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40 % 256, 80, 120)).save(out, "PNG")
    return out.getvalue()


def tar_bytes(chance: random.Random) -> bytes:
    """A WebDataset shard, by tarfile, with headers changed and their sums made right again."""
    out = io.BytesIO()
    kind = chance.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for n in range(4):
            stem = f"{'d' * 60}/{'e' * 60}/{n:03d}" if chance.random() < 0.2 else f"{n:03d}"
            record = json.dumps({"identity": f"p{n // 2}", "caption": "x"}).encode()
            for end, data in (("png", photo_bytes(n)), ("json", record), ("txt", b"a photo")):
                info = tarfile.TarInfo(f"{stem}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    data = bytearray(mutated(out.getvalue(), chance))
    if chance.random() < 0.7:
        for at in range(0, len(data) - 511, 512):
            block = data[at : at + 512]
            if block[257:262] == b"ustar":
                block[148:156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(data)


def try_tar(path: Path, chance: random.Random) -> None:
    """What inspect says of it, and every photo and sidecar that prepare would take from it."""
    folder = path.parent / "tars"
    folder.mkdir(exist_ok=True)
    shard = folder / "s.tar"
    shard.write_bytes(tar_bytes(chance))
    size = shard.stat().st_size
    problems: list[InfiniteIDError] = []
    try:
        found = inspect.inspect_file(shard)
        expect(all(isinstance(p, str) and len(p) < 5000 for p in found.problems), "odd problems")
    except InfiniteIDError as error:
        problems.append(error)
    sources, counted = list_tar(folder, "s.tar")
    expect(bool(sources or counted), "neither a photo nor a reason")
    for source in sources:
        beside = read_sidecars(folder, source)
        json.dumps(beside.record)
        beside.caption.encode()
        try:
            data = read_blob(folder, source.photo, 2**24)
            expect(len(data) <= size, "a photo larger than its shard")
            photo = open_photo(data, max_side=64, max_pixels=2**20)
            expect(photo.picture.shape[2] == 3, "a photo that is not RGB")
        except PhotoError:
            continue
    if problems:
        raise problems[0]


_INDEX: dict[str, Any] = {}


def _sound_dataset(folder: Path) -> list[dict[str, Any]]:
    """Four photos of two people in one shard, and their rows."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    rows = []
    with (folder / "shards" / "00000.tar").open("wb") as file:
        writer = ShardWriter(file)
        for n in range(4):
            photo = photo_bytes(n)
            face = np.full(512, n + 1, np.float32)
            placed = writer.add(f"{n:024x}", photo, "png", face, {"identity": f"p{n // 2}"})
            digest = hashlib.sha256(photo).hexdigest()
            rows.append({
                "key": f"{n:024x}", "shard": "00000.tar", "offset": placed.offset,
                "size": placed.size, "face_offset": placed.face_offset, "sha256": digest,
                "source_sha256": digest, "identity": f"p{n // 2}", "split": "train", "source": "s",
                "licence": "cc0", "caption": "c", "width": 8, "height": 8,
                "box": [0.0, 0.0, 4.0, 4.0], "landmarks": [float(i) for i in range(10)],
                "det_score": 0.9, "faces": 1, "face_size": 4.0, "face_share": 0.2, "blur": 100.0,
                "yaw": 1.0, "pitch": 2.0, "roll": 3.0, "similarity": 0.8, "phash": "0" * 16,
                "group": f"{n:024x}", "dropped": "", "detail": "",
            })  # fmt: skip
        writer.close()
    return rows


def _changed_rows(rows: list[dict[str, Any]], chance: random.Random) -> pa.Table:
    """One value replaced by another of its type: the file itself stays a good Parquet file."""
    row = chance.choice(rows)
    name = chance.choice(list(row))
    kind = index_file.SCHEMA.field(name).type
    texts = ("", "../../secret", "/etc/passwd", "a\0.tar", "x" * 5000, "00001.tar", ".", "train")
    numbers = (0, -1, 1, 2**31 - 1, -(2**31), 513, 5)
    if kind == pa.string():
        row[name] = chance.choice((None, *texts))
    elif kind in (pa.int32(), pa.int64()):
        large = (2**62, 2**63 - 1, -(2**63)) if kind == pa.int64() else ()
        row[name] = chance.choice((None, *numbers, *large))
    elif kind == pa.float32():
        row[name] = chance.choice((None, math.nan, math.inf, -1.0, 1e30))
    else:
        row[name] = chance.choice((None, [math.nan] * kind.list_size, [-1e30] * kind.list_size))
    return index_file.table_of(rows)


def _index_bytes(folder: Path, chance: random.Random) -> bytes:
    if "rows" not in _INDEX:
        _INDEX["rows"] = _sound_dataset(folder)
    rows = [dict(row) for row in _INDEX["rows"]]
    info = DatasetInfo(recogniser="r", fingerprint="f" * 64, counts={"kept": 4}, options={})
    way = chance.random()
    table = _changed_rows(rows, chance) if way < 0.4 else index_file.table_of(rows)
    out = io.BytesIO()
    index_file.write_index(out, table, info)  # type: ignore[arg-type]
    if way < 0.4:
        return out.getvalue()
    if way < 0.6:
        sound = pq.read_table(io.BytesIO(out.getvalue()))
        said = json.loads(sound.schema.metadata[index_file.METADATA])
        text = json.dumps(changed(said, chance)).encode()
        other = io.BytesIO()
        pq.write_table(sound.replace_schema_metadata({index_file.METADATA: text}), other)
        return other.getvalue()
    data = bytearray(out.getvalue())
    # The footer says everything; half of the changes go there.
    footer = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - footer
    if chance.random() < 0.5:
        piece = mutated(bytes(data[start:-8]), chance)
        return bytes(data[:start]) + piece + len(piece).to_bytes(4, "little") + b"PAR1"
    return mutated(bytes(data), chance)


def try_index(path: Path, chance: random.Random) -> None:
    """Read the index; each photo it gives must be the one it names, out of the dataset."""
    folder = path.parent / "data"
    data = _index_bytes(folder, chance)
    (folder / INDEX).write_bytes(data)
    with contextlib.suppress(InfiniteIDError):
        inspect.inspect_file(folder)
    try:
        dataset = Dataset(folder, OPEN)
    except FilterError:
        return
    for number in range(len(dataset)):
        row = dataset.row(number)
        expect(is_shard_name(row.shard), f"a shard {row.shard!r}")
        expect(row.width > 0 and row.height > 0, "a photo without pixels")
        try:
            photo = dataset.photo_bytes(number)
            expect(hashlib.sha256(photo).hexdigest() == row.sha256, "another photo")
            expect(bool(np.isfinite(dataset.face(number)).all()), "a face that is no number")
        except InfiniteIDError:
            continue


TRIES: dict[str, Callable[[Path, random.Random], None]] = {
    "adapter": try_adapter,
    "identity": try_identity,
    "features": try_features,
    "published": try_published,
    "pickle": try_pickle,
    "tar": try_tar,
    "index": try_index,
}


# --- the run ---------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of one kind's files."""

    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    kilobytes: int = 0


def _peak() -> int:
    """The largest memory so far, in kB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def run(count: int, seed: int, only: str = "") -> dict[str, Tally]:
    """``count`` files, all kinds in turn. Each file's bytes depend on seed and number alone."""
    torch.set_num_threads(1)
    watched: list[str] = []
    active = [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active[0] and event in _RUNS:
            watched.append(f"{event} {arguments!r}"[:300])

    sys.addaudithook(hook)
    tallies = {kind: Tally() for kind in TRIES if only in ("", kind)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in tallies:  # what libraries load once is no file's time or memory
            _one(kind, Path(folder), random.Random(f"{seed} warm {kind}"), Tally())
        for number in range(count):
            kind = list(tallies)[number % len(tallies)]
            active[0] = True
            if number % 100 == 0:
                print(f"file {number} of {count}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(HUNG, exit=True)
            _one(kind, Path(folder), random.Random(f"{seed} {number}"), tallies[kind], number)
            faulthandler.cancel_dump_traceback_later()
            active[0] = False
            tallies[kind].faults += [f"{number}: ran {event}" for event in watched]
            watched.clear()
    return tallies


def _one(kind: str, folder: Path, chance: random.Random, tally: Tally, number: int = -1) -> None:
    before, started = _peak(), time.process_time()
    try:
        TRIES[kind](folder / f"file.{kind}", chance)
        tally.accepted += 1
    except InfiniteIDError as error:
        name = type(error).__name__
        tally.refused[name] = tally.refused.get(name, 0) + 1
        if len(str(error)) > 6000:
            tally.faults.append(f"{number}: an error of {len(str(error))} letters")
    except (Exception, SystemExit):
        tally.faults.append(f"{number}: {traceback.format_exc(limit=-6)}")
    seconds, kilobytes = time.process_time() - started, _peak() - before
    tally.seconds = max(tally.seconds, seconds)
    tally.kilobytes = max(tally.kilobytes, kilobytes)
    if seconds > SECONDS or kilobytes > KILOBYTES:
        tally.faults.append(f"{number}: took {seconds:.1f} s and {kilobytes} kB")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["", *TRIES], default="")
    values = parser.parse_args()
    tallies = run(values.count, values.seed, values.only)
    for kind, tally in tallies.items():
        refused = dict(sorted(tally.refused.items(), key=lambda item: -item[1]))
        print(
            json.dumps(
                {"kind": kind, "accepted": tally.accepted, "refused": refused,
                 "worst_seconds": round(tally.seconds, 3), "worst_kilobytes": tally.kilobytes,
                 "faults": tally.faults}
            )
        )  # fmt: skip
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
