"""A FaceID file's LoRA on a call's rows, against the matrix product written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from infinite_id_core.errors import OptionError
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.attention import StreamOptions
from infinite_id_core.method.layer_parts import LowRank, LowRankShape
from infinite_id_core.method.low_rank import LowRankRun, LowRankUse
from infinite_id_core.method.rows import Rows

TWO, ONE = StreamOptions(), StreamOptions(mixing="off", style="off")


def adapter(*names: str, seed: int = 1) -> Adapter:
    torch.manual_seed(seed)
    parts = {name: LowRank(LowRankShape(inputs=6, rank=2, outputs=8)) for name in names}
    return cast(Adapter, SimpleNamespaceHash(low_rank_parts=parts))


class SimpleNamespaceHash(SimpleNamespace):
    """As an adapter is: equal to itself alone."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


def runs(uses: list[LowRankUse], adapters: list[Adapter], options: Any = TWO) -> LowRankRun:
    return LowRankRun(uses, adapters, options)


@pytest.mark.parametrize(
    ("rows", "options", "where"),
    [
        ("auto", TWO, "identity"),
        ("auto", ONE, "all"),
        ("identity", ONE, "all"),  # there are no others
        ("all", TWO, "all"),
        ("off", TWO, "off"),
        ("off", ONE, "off"),
    ],
)
def test_where_it_acts(rows: Any, options: StreamOptions, where: str) -> None:
    assert LowRankUse(rows=rows).rows_in(options) == where
    assert LowRankUse(rows=rows, strength=0.0).rows_in(options) == "off"


@pytest.mark.parametrize(
    "values", [{"rows": "some"}, {"strength": 2.5}, {"strength": -1.0}, {"strength": float("nan")}]
)
def test_a_wrong_use_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        LowRankUse(**values)


def test_it_changes_the_peoples_rows_alone_and_once_for_an_adapter() -> None:
    mine, other = adapter("a.to_q"), adapter("a.to_q", seed=2)
    uses = [LowRankUse(strength=s) for s in (0.5, 0.25, 1.5)]
    run = runs(uses, [mine, mine, other])
    people = run.active((0, 1, 2))
    x, y, rows = torch.randn(4, 5, 6), torch.randn(4, 5, 8), Rows.both(2)
    of = [mine, mine, other].__getitem__
    out = run.on_people("a.to_q", y, x, rows, people, of)
    assert torch.equal(out[[0, 2]], y[[0, 2]])  # each prompt's text stream
    wanted = y
    for one, strength in ((mine, 0.5), (other, 1.5)):
        part = one.low_rank_parts["a.to_q"]
        wanted = wanted + strength * x @ part.down.weight.T @ part.up.weight.T
    torch.testing.assert_close(out[[1, 3]], wanted[[1, 3]])
    assert run.on_people("a.to_k", y, x, rows, people, of) is y
    assert run.active((1,)) == (1,)


def test_half_precision_is_met_by_the_parts_own() -> None:
    run, one = runs([LowRankUse()], [mine := adapter("a.to_q")]), [mine].__getitem__
    added = run.added("a.to_q", torch.randn(2, 3, 6).half(), (0,), one)
    assert added is not None and added.dtype == torch.float16 and bool(added.isfinite().all())


def test_an_adapter_without_one_has_none() -> None:
    run = runs([LowRankUse(rows="all")], [adapter()])
    assert run.all == run.identity == ()
