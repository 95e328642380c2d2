"""The order of the stages, from the input's listing to the finished index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from infinite_id_core.errors import OptionError
from infinite_id_core.faces.pack import find_pack
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.pictures import readable_formats

from ..errors import NoFacesError, NoPairsError, disk_errors
from ..files import locked
from ..index_file import INDEX, DatasetInfo, write_index
from ..shards import SHARDS
from .engines import Engine, open_engine
from .faces import FaceModels
from .group import GROUP_VERSION, Grouped, group_photos
from .manifest import (
    Target,
    fingerprint_of,
    finish,
    finished,
    output_hashes,
    remove_leftovers,
)
from .options import Places, PrepareOptions, RunOptions
from .parts import NOT_PHOTOS, Listing, Part
from .report import photos_with_more_faces, write_report
from .sources import list_input
from .stages import (
    DetectArguments,
    EmbedArguments,
    Task,
    WriteArguments,
)
from .tables import counts_of, faces_table, index_rows, read_groups, write_groups

STAGE_VERSION = 2  # counts up when a stage gives another result for the same input
_REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What ``prepare`` made."""

    info: DatasetInfo
    identities: int
    held_out: int
    """People kept out of training."""
    more_faces: int
    """Kept photos that show more faces than the one that was used."""
    shards: int
    bytes: int
    seconds: float
    tasks_done_before: int
    """Tasks that an earlier run had finished."""


def prepare(places: Places, options: PrepareOptions, run: RunOptions | None = None) -> Summary:
    """Photos in ``places.source`` to a dataset in ``places.output``.

    Call it again after a crash: finished parts are kept, whatever was half-written is redone.
    Raises ``NoFacesError``, ``NoPairsError``, ``InputKindError``, ``BusyError``,
    ``DiskFullError``, ``DatasetError``, ``EngineError``, ``FaceModelError`` and others of
    ``InfiniteIDError``.
    """
    run = run or RunOptions()
    _check_places(places)
    listing = list_input(places.source, options)  # before a folder is made for nothing
    with locked(places.output, "prepare", wait=0), open_engine(run) as engine:
        return _Preparation(places, options, run, engine).all(listing)


class _Preparation:
    def __init__(
        self, places: Places, options: PrepareOptions, run: RunOptions, engine: Engine
    ) -> None:
        self.places, self.options, self.run, self.engine = places, options, run, engine
        self.models = FaceModels(
            folder=places.face_models.absolute(),
            detector_size=options.detector_size,
            min_detection=options.min_detection,
            provider=run.provider,
            threads=run.thread_count,
        )
        self.done_before = 0
        self.recogniser = ""
        self.root = places.source if places.source.is_dir() else places.source.parent

    def all(self, listing: Listing) -> Summary:
        """Every stage in order."""
        started = time.monotonic()
        remove_leftovers(self.places.output)
        detected, faces = self._detect(listing)
        embedded = self._embed(detected, faces)
        grouped, target = self._group(listing, detected, embedded)
        self._check_any(grouped)
        written = self._write(grouped, target)
        info = self._index(grouped, target, written)
        if self.run.report:
            self._report(grouped, info)
        people = set(
            zip(*(grouped.kept[n].to_pylist() for n in ("identity", "split")), strict=True)
        )
        return Summary(
            info=info,
            identities=len(people),
            held_out=sum(split == "held_out" for _, split in people),
            more_faces=photos_with_more_faces(grouped.kept, info.options),
            shards=len(written),
            bytes=sum(t.outputs[0].stat().st_size for t in written),
            seconds=time.monotonic() - started,
            tasks_done_before=self.done_before,
        )

    # --- stages ------------------------------------------------------------------------------

    def _detect(self, listing: Listing) -> tuple[list[Target], int]:
        """The parts, and how many faces they hold."""
        labelled = listing.labelled or bool(self.options.identity_field)
        formats = readable_formats()
        made = ("detector_size", "min_detection", "max_side", "max_pixels", "max_bytes", "faces",
                "identity_field", "licence")  # fmt: skip
        tasks = [
            Task(
                stage="detect",
                target=self._target(
                    "detect", part.number, self._option_values(made), part.fingerprint,
                    self.models.fingerprint, labelled, formats,
                ),
                arguments=DetectArguments(
                    root=self.root, part=part, labelled=labelled, models=self.models,
                    options=self.options,
                ),
            )
            for part in listing.parts
        ]  # fmt: skip
        counts = self._run_all("detect, align", "photos", tasks, _photo_count(listing.parts))
        return [task.target for task in tasks], sum(count["faces"] for count in counts)

    def _embed(self, detected: Sequence[Target], faces: int) -> list[Target]:
        tasks = [
            Task(
                stage="embed",
                target=self._target(
                    "embed", number, output_hashes(target), self.models.fingerprint
                ),
                arguments=EmbedArguments(faces=target.outputs[0], models=self.models),
            )
            for number, target in enumerate(detected)
        ]
        counts = self._run_all("embed", "faces", tasks, faces)
        self.recogniser = counts[0]["recogniser"]
        return [task.target for task in tasks]

    def _group(
        self, listing: Listing, detected: Sequence[Target], embedded: Sequence[Target]
    ) -> tuple[Grouped, Target]:
        labelled = listing.labelled or bool(self.options.identity_field)
        inputs = [output_hashes(target) for target in (*detected, *embedded)]
        work = self.places.work
        target = Target(
            record=work / "group.json",
            outputs=(work / "group.parquet", work / "dropped.parquet"),
            fingerprint=fingerprint_of(
                STAGE_VERSION, GROUP_VERSION, inputs, self.options.to_json()
            ),
        )
        known = finished(target)
        if known is not None:
            self.done_before += 1
            return read_groups(target, known), target
        table = faces_table(detected, embedded)
        with self._bar("group", "faces", len(table)) as bar:
            grouped = group_photos(table, labelled, self.options)
            write_groups(target, grouped)
            finish(target, {"shards": grouped.shards, "alike": grouped.alike})
            bar.update(len(table))
        return grouped, target

    def _write(self, grouped: Grouped, group: Target) -> list[Target]:
        inputs = output_hashes(group)
        self._retire_index(self._index_target(group).fingerprint)
        tasks = []
        for number in range(len(grouped.shards)):
            name = f"{number:05d}"
            target = Target(
                record=self.places.work / "write" / f"{name}.json",
                outputs=(
                    self.places.output / SHARDS / f"{name}.tar",
                    self.places.work / "write" / f"{name}.parquet",
                ),
                fingerprint=fingerprint_of(STAGE_VERSION, inputs, self.options.max_side, number),
            )
            arguments = WriteArguments(
                root=self.root, grouped=group.outputs[0], row_group=number, options=self.options
            )
            tasks.append(Task(stage="write", target=target, arguments=arguments))
        self._run_all("write shards", "photos", tasks, len(grouped.kept))
        return [task.target for task in tasks]

    def _index(self, grouped: Grouped, group: Target, written: Sequence[Target]) -> DatasetInfo:
        kept = pa.concat_tables([pq.read_table(target.outputs[1]) for target in written])
        table = pa.concat_tables([kept, index_rows(grouped.dropped)])
        info = DatasetInfo(
            recogniser=self.recogniser,
            fingerprint=fingerprint_of(
                [kept[name].to_pylist() for name in ("key", "sha256", "identity", "split")]
            ),
            counts=counts_of(grouped),
            options=self.options.to_json(),
        )
        target = self._index_target(group)
        path = target.outputs[0]
        if finished(target) is None:
            with disk_errors(path), replacing(path) as temporary:
                write_index(temporary, table, info)
            finish(target, info.counts)
        for stale in set((self.places.output / SHARDS).glob("*.tar")) - {
            t.outputs[0] for t in written
        }:
            stale.unlink()
        return info

    def _report(self, grouped: Grouped, info: DatasetInfo) -> None:
        page = self.places.output / _REPORT
        target = Target(
            record=self.places.work / "report.json",
            outputs=(page,),
            fingerprint=fingerprint_of(STAGE_VERSION, info.fingerprint, info.counts),
        )
        if finished(target) is None:
            with self._bar("report", "pages", 1) as bar:
                write_report(page, self.root, grouped, info)
                finish(target, {})
                bar.update(1)

    # --- helpers -----------------------------------------------------------------------------

    def _check_any(self, grouped: Grouped) -> None:
        if len(grouped.kept):
            return
        counts = counts_of(grouped)
        listed = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n)
        if self.run.report:
            info = DatasetInfo(
                recogniser=self.recogniser, fingerprint="", counts=counts, options={}
            )
            write_report(self.places.output / _REPORT, self.root, grouped, info)
        page = f" {self.places.output / _REPORT} shows them." if self.run.report else ""
        if not any(value for value in grouped.dropped["faces"].to_pylist()):
            photos = sum(n for reason, n in counts.items() if reason not in NOT_PHOTOS)
            raise NoFacesError(
                f"{self.places.source}: not one face in {photos} photos ({listed})."
                f"{page} Check the input, or lower --min-detection or --detector-size."
            )
        raise NoPairsError(
            f"{self.places.source}: no person has {self.options.min_photos} usable photos "
            f"({listed}).{page} Reference and target are two photos of one person: add photos, or "
            "put each person's photos into one folder."
        )

    def _retire_index(self, fingerprint: str) -> None:
        """An index of other contents must not outlive its shards, should this run be killed."""
        record = self.places.work / "index.json"
        index = self.places.output / INDEX
        target = Target(record=record, outputs=(index,), fingerprint=fingerprint)
        if finished(target) is None:
            index.unlink(missing_ok=True)
            record.unlink(missing_ok=True)

    def _index_target(self, group: Target) -> Target:
        return Target(
            record=self.places.work / "index.json",
            outputs=(self.places.output / INDEX,),
            fingerprint=fingerprint_of(STAGE_VERSION, output_hashes(group), self.recogniser),
        )

    def _target(self, stage: str, number: int, *made_of: object) -> Target:
        folder = self.places.work / stage
        return Target(
            record=folder / f"{number:05d}.json",
            outputs=(folder / f"{number:05d}.parquet",),
            fingerprint=fingerprint_of(STAGE_VERSION, stage, *made_of),
        )

    def _option_values(self, names: Sequence[str]) -> list[Any]:
        return [getattr(self.options, name) for name in names]

    def _run_all(
        self, what: str, unit: str, tasks: Sequence[Task], total: int | None
    ) -> list[dict[str, Any]]:
        """Run tasks with a progress bar; the first named error ends the run."""
        counts = []
        with self._bar(what, unit, total) as bar:
            for outcome in self.engine.run(tasks):
                if outcome.error is not None:
                    raise outcome.error
                self.done_before += not outcome.fresh
                counts.append(outcome.counts)
                bar.update(outcome.counts[unit])
        return counts

    def _bar(self, what: str, unit: str, total: int | None) -> Any:
        return tqdm(
            total=total,
            desc=f"{what:14}",
            unit=f" {unit}",
            disable=not self.run.progress,
            dynamic_ncols=True,
        )


def _photo_count(parts: Sequence[Part]) -> int | None:
    """Photos to come; unknown where tars are not listed yet."""
    return None if any(part.tar for part in parts) else sum(len(part.sources) for part in parts)


def _check_places(places: Places) -> None:
    source, output = places.source.resolve(), places.output.resolve()
    if output == source or source in output.parents:
        raise OptionError(
            f"OUTPUT {output} lies inside INPUT {source}; its shards would be read as photos. "
            "Choose a folder outside."
        )
    if output.is_file():
        raise OptionError(f"OUTPUT {output} is a file; expected a folder, new or ours.")
    find_pack(places.face_models.name, [places.face_models.parent.parent])
