"""``report.txt``: what a run learns from, beside what it makes of it."""

from __future__ import annotations

from pathlib import Path

from infinite_id_core.files.atomic import replacing

from ..config import TrainConfig
from ..data_index import Dataset
from ..errors import disk_errors
from ..histograms import data_report

FILE = "report.txt"


def photos_in_bars(config: TrainConfig) -> str:
    """Histograms of the photos that pass the run's filters. Raises as ``Dataset``."""
    everybody = Dataset(config.data.folder, config.filters, split=None)
    return data_report(everybody.table, config.data)


def write_report(config: TrainConfig) -> None:
    """Write them to the output folder. Raises ``DiskFullError``, and as ``Dataset``."""
    path = Path(config.run.output) / FILE
    # A report is shown to others: the folder's name, not where it lies on this machine.
    text = f"{Path(config.data.folder).name}\n\n{photos_in_bars(config)}\n"
    with disk_errors(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
