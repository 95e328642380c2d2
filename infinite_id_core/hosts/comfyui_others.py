"""Functions that other packs put into a model, one copy for each stream.

Guidance functions, wrappers and attention replacements look at the rows they are given, and some
remember them from step to step: in variables of the function that made them, in default
arguments, or in an object. So each stream calls them with its own rows, and the text stream calls
copies of them that remember apart, as if the node had been applied to a second model.
"""

from __future__ import annotations

import copy
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
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
TRANSFORMER_OPTIONS = frozenset(
    {"patches", "patches_replace", "wrappers", "callbacks", "sigmas", "sample_sigmas"}
)
"""The host's own, which hold no state or are copied function by function."""
SHARED_MODULES = frozenset(
    {"builtins", "collections", "comfy", "comfy_api", "comfy_execution", "enum", "functools"}
    | {"logging", "numpy", "pathlib", "threading", "torch", "types", "uuid", "_thread"}
)


class Twins:
    """The text stream's copies, made when they are first needed and kept for a run."""

    def __init__(self) -> None:
        self._twins: dict[int, tuple[Any, Any]] = {}  # the first keeps the id alive
        self._originals: dict[int, Any] = {}

    def of(self, thing: Any) -> Any:
        """The text stream's copy of what can remember something; all else is itself.

        Functions with their variables, default arguments and objects; the host's models, torch's
        modules and tensors stay shared.
        """
        if id(thing) in self._originals:
            return thing
        if id(thing) in self._twins:
            return self._twins[id(thing)][1]
        if isinstance(thing, partial):
            return partial(self.of(thing.func), *thing.args, **thing.keywords)
        if isinstance(thing, MethodType):
            return self._remembered(thing, MethodType(thing.__func__, self.of(thing.__self__)))
        if isinstance(thing, FunctionType):
            return self._copy_function(thing)
        if isinstance(thing, (dict, list, set)):
            return self._copy_container(thing)
        return self._copy_object(thing) if _remembers(thing) else thing

    def original(self, thing: Any) -> Any:
        """The identity stream's side of a function, whichever of the two is given."""
        return self._originals.get(id(thing), thing)

    def options(self, model_options: Options, own: str) -> Options:
        """Model options for the text stream; ``own`` is the key of our wrappers, left alone."""
        options = dict(model_options)
        options.update({k: self.of(options[k]) for k in GUIDANCE if k in options})
        for key in GUIDANCE_LISTS:
            if key in options:
                options[key] = [self.of(function) for function in options[key]]
        transformer = {
            k: v if k in (own, *TRANSFORMER_OPTIONS) else self.of(v)
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

    def _remembered(self, thing: Any, twin: Any) -> Any:
        self._twins[id(thing)] = (thing, twin)
        self._originals[id(twin)] = thing
        return twin

    def _copy_container(self, thing: Any) -> Any:
        twin = self._remembered(thing, copy.copy(thing))  # before it is filled: it may hold itself
        if isinstance(twin, dict):
            twin.update({key: self.of(value) for key, value in thing.items()})
        elif isinstance(twin, list):
            twin[:] = [self.of(value) for value in thing]
        return twin

    def _copy_object(self, thing: Any) -> Any:
        try:
            twin = copy.copy(thing)
        except Exception:  # whatever its class raises: it cannot be copied, so it is shared
            return thing
        if twin is thing:
            return thing
        self._remembered(thing, twin)
        for name, value in list(vars(twin).items()):
            object.__setattr__(twin, name, self.of(value))
        return twin

    def _copy_function(self, thing: FunctionType) -> Any:
        defaults = tuple(self.of(value) for value in thing.__defaults__ or ())
        keywords = {k: self.of(v) for k, v in (thing.__kwdefaults__ or {}).items()}
        changed = (*zip(defaults, thing.__defaults__ or (), strict=True),)
        changed += (*((v, (thing.__kwdefaults__ or {})[k]) for k, v in keywords.items()),)
        if not thing.__closure__ and all(new is old for new, old in changed):
            return thing
        cells = tuple(self._cell(cell) for cell in thing.__closure__ or ())
        twin = FunctionType(thing.__code__, thing.__globals__, thing.__name__, defaults, cells)
        twin.__kwdefaults__ = keywords or None
        twin.__dict__.update(thing.__dict__)
        twin.__qualname__ = thing.__qualname__
        twin.__module__ = thing.__module__
        self._remembered(thing, twin)  # before the cells are filled: one may hold the function
        for old, new in zip(thing.__closure__ or (), cells, strict=True):
            if _filled(old) and not _filled(new):
                new.cell_contents = self.of(old.cell_contents)
        return twin

    def _cell(self, cell: CellType) -> CellType:
        """Functions that share a variable keep sharing it on the text stream's side."""
        if id(cell) in self._twins:
            twin: CellType = self._twins[id(cell)][1]
            return twin
        return self._remembered(cell, CellType())  # type: ignore[no-any-return]


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


def _remembers(thing: Any) -> bool:
    """Whether an object may keep something from step to step that belongs to one stream.

    The host's own objects (models, patchers, samplers) and those of libraries are tools, which
    both streams use; what nodes are made of, the host's extras included, is not.
    """
    if not hasattr(thing, "__dict__") or isinstance(thing, (type, ModuleType, torch.nn.Module)):
        return False
    roots = [base.__module__.split(".")[0] for base in type(thing).__mro__]
    return roots[0] not in SHARED_MODULES and not {"comfy", "torch"} & set(roots)
