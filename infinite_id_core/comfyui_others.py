"""Functions that other packs put into a model, one copy for each stream.

Guidance functions, wrappers and attention replacements look at the rows they are given, and some
remember them from step to step: in variables of the function that made them, or in an object in
the model's options. So each stream calls them with its own rows, and the text stream calls
copies of them that remember apart, as if the node had been applied to a second model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .comfyui_rows import Conds

Options = dict[str, Any]

GUIDANCE = ("sampler_cfg_function", "sampler_calc_cond_batch_function", "model_function_wrapper")
GUIDANCE_LISTS = ("sampler_pre_cfg_function", "sampler_post_cfg_function")
MODEL_WRAPPERS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
INDIFFERENT = frozenset({"torch.compile"})
"""Keys of the host's wrappers around the model that take rows as they come."""


class Twins:
    """The text stream's copies, made when they are first needed and kept for a run."""

    def __init__(self) -> None:
        self._twins: dict[int, tuple[Any, Any]] = {}  # the first keeps the id alive
        self._originals: dict[int, Any] = {}

    def of(self, thing: Any) -> Any:
        """The text stream's copy of a function; what cannot remember anything is itself."""
        return self._once(thing, self._copy_function)

    def original(self, thing: Any) -> Any:
        """The identity stream's side of a function, whichever of the two is given."""
        return self._originals.get(id(thing), thing)

    def options(self, model_options: Options, own: str) -> Options:
        """Model options for the text stream; ``own`` is the key of our wrappers, left alone."""
        options = dict(model_options)
        options.update({k: self.of(options[k]) for k in GUIDANCE if k in options})
        options.update(
            {k: [self.of(f) for f in options[k]] for k in GUIDANCE_LISTS & options.keys()}
        )
        transformer = {
            k: v if k == own else self._once(v, _copy_state)
            for k, v in options["transformer_options"].items()
        }
        transformer["patches_replace"] = {
            kind: {block: self.of(f) for block, f in patches.items()}
            for kind, patches in transformer.get("patches_replace", {}).items()
        }
        transformer["wrappers"] = {
            kind: {k: fs if k == own else [self.of(f) for f in fs] for k, fs in by_key.items()}
            for kind, by_key in transformer.get("wrappers", {}).items()
        }
        return {**options, "transformer_options": transformer}

    def _once(self, thing: Any, make: Callable[[Any], Any]) -> Any:
        if id(thing) in self._originals:
            return thing
        if id(thing) in self._twins:
            return self._twins[id(thing)][1]
        twin = make(thing)
        if twin is not thing:
            self._remember(thing, twin)
        return twin

    def _remember(self, thing: Any, twin: Any) -> None:
        self._twins[id(thing)] = (thing, twin)
        self._originals[id(twin)] = thing

    def _copy_function(self, thing: Any) -> Any:
        if isinstance(thing, partial):
            return partial(self.of(thing.func), *thing.args, **thing.keywords)
        if not isinstance(thing, FunctionType) or not thing.__closure__:
            return thing
        cells = tuple(self._cell(cell) for cell in thing.__closure__)
        twin = FunctionType(
            thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, cells
        )
        twin.__kwdefaults__ = thing.__kwdefaults__
        twin.__dict__.update(thing.__dict__)
        twin.__qualname__ = thing.__qualname__
        self._remember(thing, twin)  # before the cells are filled: one may hold the function
        for old, new in zip(thing.__closure__, cells, strict=True):
            self._fill(old, new)
        return twin

    def _cell(self, cell: CellType) -> CellType:
        """Functions that share a variable keep sharing it on the text stream's side."""
        twin: CellType = self._once(cell, lambda _: CellType())
        return twin

    def _fill(self, old: CellType, new: CellType) -> None:
        if _filled(new) or not _filled(old):
            return
        content = old.cell_contents
        if isinstance(content, (dict, list, set)):
            new.cell_contents = self._once(content, copy.copy)
        else:
            new.cell_contents = self.of(content)


def sampler_functions(options: Options, known: frozenset[int]) -> tuple[Options, list[Any]]:
    """Options without the guidance functions that the sampler itself added, and those functions.

    They stand last, and read the rows of both streams as the sampler does. ``known`` are the ids
    of the functions that were there before the sampler began.
    """
    functions = options.get("sampler_post_cfg_function", [])
    added = [f for f in functions if id(f) not in known]
    if not added:
        return options, []
    kept = [f for f in functions if id(f) in known]
    return {**options, "sampler_post_cfg_function": kept}, added


def model_wrappers(options: Options, conds: Conds, own: str) -> list[Any]:
    """What other packs wrapped around the model, where the rows of both streams would meet it.

    Into the options, or as a hook of one cond, which the host adds in that cond's calls.
    """
    found = [options["model_function_wrapper"]] if "model_function_wrapper" in options else []
    for transformer in (options.get("transformer_options", {}), *_hooked(conds)):
        for kind in MODEL_WRAPPERS:
            for key, functions in transformer.get("wrappers", {}).get(kind, {}).items():
                found += [] if key in (own, *INDIFFERENT) else functions
    return found


def _hooked(conds: Conds) -> list[Options]:
    groups = [cond.get("hooks") for conds_of_a_side in conds for cond in conds_of_a_side or ()]
    hooks = [hook for group in groups if group is not None for hook in group.hooks]
    return [getattr(hook, "transformers_dict", None) or {} for hook in hooks]


def without_model_wrappers(options: Options, own: str) -> Options:
    """Options in which nothing of other packs stands around the model."""
    stripped = {k: v for k, v in options.items() if k != "model_function_wrapper"}
    transformer = options["transformer_options"]
    wrappers = {
        kind: {k: f for k, f in by_key.items() if k in (own, *INDIFFERENT)}
        if kind in MODEL_WRAPPERS
        else by_key
        for kind, by_key in transformer.get("wrappers", {}).items()
    }
    return {**stripped, "transformer_options": {**transformer, "wrappers": wrappers}}


def name_of(function: Any) -> str:
    """How a message names another pack's function."""
    inner = getattr(function, "func", function)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{getattr(inner, '__module__', '?')}.{name}"


def _filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _copy_state(thing: Any) -> Any:
    """A copy of an object that remembers: its attributes apart, its lists and dicts as well."""
    plain = (type, ModuleType, torch.Tensor, torch.nn.Module)
    if not hasattr(thing, "__dict__") or isinstance(thing, plain) or callable(thing):
        return thing
    twin = copy.copy(thing)
    for name, value in list(vars(twin).items()):
        if isinstance(value, (dict, list, set)):
            setattr(twin, name, copy.copy(value))
    return twin
