"""Rows of ComfyUI's conditioning, fitted so that both streams get the same."""

from __future__ import annotations

from typing import Any

import comfy.utils
from torch import Tensor

Cond = dict[str, Any]
Conds = list[list[Cond] | None]


def fit_rows(x: Tensor, rows: int) -> Tensor:
    """What the host would do to ``rows`` rows, done before they are doubled."""
    if x.shape[0] in (1, rows):
        return x
    fitted: Tensor = comfy.utils.repeat_to_batch_size(x, rows)
    return fitted


def fit_conds(conds: Conds, rows: int) -> Conds:
    """Per-row conditioning of another batch size than one stream's ``rows``, fitted to it."""
    return [None if cond is None else [_fit_cond(c, rows) for c in cond] for cond in conds]


class HalvedControl:
    """A ControlNet that is asked for the rows of both streams.

    The host deals a batch of hints over the rows of each cond: twice as many conds, each with the
    rows of one stream, give both streams the hints that one has without us.
    """

    def __init__(self, control: Any) -> None:
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, x: Tensor, t: Tensor, cond: Any, conds: int, *args: Any) -> Any:
        """The host's ``ControlBase.get_control`` for ``conds`` conds of two streams each."""
        return self._control.get_control(x, t, cond, 2 * conds, *args)

    def get_instance_for_device(self, device: Any) -> HalvedControl:
        """The host's, on several GPUs."""
        return HalvedControl(self._control.get_instance_for_device(device))


def halve_controls(conds: Conds, halved: dict[int, HalvedControl]) -> Conds:
    """Conds whose ControlNets are asked for both streams.

    ``halved`` keeps one for each: by its identity the host knows which conds may share a call.
    """

    def of(cond: Cond) -> Cond:
        control = cond.get("control")
        if control is None:
            return cond
        return {**cond, "control": halved.setdefault(id(control), HalvedControl(control))}

    return [None if cond is None else [of(c) for c in cond] for cond in conds]


def uuids_of(conds: Conds) -> list[list[Any]]:
    """Tells whether two evaluations were asked for the same."""
    return [[c.get("uuid") for c in cond or ()] for cond in conds]


def in_window(x: Tensor, window: Any, frames: int) -> Tensor:
    """The rows of ``x`` that a context window of the batch shows, its anchor row included.

    ``x`` has one row, which serves all, or any number that the host would repeat to ``frames``.
    """
    if x.shape[0] == 1 or getattr(window, "dim", 0) != 0:
        return x
    x = fit_rows(x, frames)
    # The host's own way puts the anchor row first; windows of other packs have an index list.
    cut: Tensor = window.get_tensor(x) if hasattr(window, "get_tensor") else x[window.index_list]
    return cut


def _fit_cond(cond: Cond, rows: int) -> Cond:
    fitted = dict(cond)
    if isinstance(cond.get("mask"), Tensor):
        fitted["mask"] = cond["mask"][:rows]
    if "model_conds" in cond:
        fitted["model_conds"] = {
            k: _fit_model_cond(v, rows) for k, v in cond["model_conds"].items()
        }
    return fitted


def _fit_model_cond(value: Any, rows: int) -> Any:
    inner = getattr(value, "cond", None)
    if not isinstance(inner, Tensor) or inner.ndim == 0 or inner.shape[0] in (1, rows):
        return value
    return value._copy_with(comfy.utils.repeat_to_batch_size(inner, rows))
