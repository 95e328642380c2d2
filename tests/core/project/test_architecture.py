"""The walls of the house (docs/architecture.md), read from the code's own imports."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ROOMS = (
    "microworld",
    "infinite_id_core",
    "infinite_id_core.sdxl",
    "infinite_id_core.method",
    "infinite_id_core.files",
    "infinite_id_core.files.published",
    "infinite_id_core.faces",
    "infinite_id_core.encoders",
    "infinite_id_core.scores",
    "infinite_id_core.hosts",
    "nodes",
    "trainer",
    "trainer.models",
    "trainer.prepare",
    "trainer.train",
    "trainer.evaluate",
    "lab",
    "lab.train",
    "tools",
    "benchmarks",
)
"""Each folder imports those before it in this list, never one after it."""
SHIPS = ("infinite_id_core", "nodes", "microworld")
"""What runs inside ComfyUI, in a package whose name ComfyUI chooses."""
HOSTS = {
    "comfy": (
        "infinite_id_core.hosts.comfyui",
        "nodes",
        "microworld.comfy_models",
        "tools",
        "benchmarks",
    ),
    "diffusers": ("infinite_id_core.hosts.diffusers", "trainer", "lab", "benchmarks"),
}
LONGEST = 400
DATA = {"microworld.portraits"}  # how every part of a portrait is drawn


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for room in sorted({room.split(".")[0] for room in ROOMS}):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


@cache
def imports(name: str) -> tuple[tuple[str, bool], ...]:
    """(dotted name, whether it is relative) of everything a module imports, late ones included."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).strip(".")
            found += [(f"{base}.{alias.name}", node.level > 0) for alias in node.names]
    return tuple(found)


def ours(dotted: str) -> str | None:
    """The module of ours that an imported name belongs to."""
    while dotted and dotted not in modules():
        dotted = dotted.rpartition(".")[0]
    return dotted or None


def needed(name: str) -> set[str]:
    targets = {ours(dotted) for dotted, _ in imports(name)}
    return {target for target in targets if target is not None and target != name}


def room(name: str) -> str:
    """The folder of a module."""
    return name if name in ROOMS else name.rpartition(".")[0]


def test_every_folder_of_sources_is_a_room_with_a_place_in_the_order():
    assert {room(name) for name in modules()} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_folder_imports_one_above_it(name):
    here = room(name)
    for target in needed(name):
        there = room(target)
        within = there.startswith(f"{here}.")  # a door of a package opens its own rooms
        assert within or ROOMS.index(there) <= ROOMS.index(here), f"{name} imports {target}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: needed(name) for name in modules()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(modules()))
def test_what_ships_imports_relatively_and_the_rest_absolutely(name):
    ships = name.split(".")[0] in SHIPS
    for dotted, relative in imports(name):
        target = ours(dotted)
        if target is None or target == name:
            continue
        if ships:
            assert relative, f"{name} imports {dotted} by a name that ComfyUI may change"
        elif target.split(".")[0] in SHIPS:
            assert not relative, f"{name} imports {dotted} relatively"


@pytest.mark.parametrize("host", sorted(HOSTS))
def test_only_the_hosts_own_modules_import_a_host(host):
    allowed = HOSTS[host]
    importers = {n for n in modules() if any(d.split(".")[0] == host for d, _ in imports(n))}
    assert importers, f"nothing imports {host}: the test looks at the wrong place"
    strangers = {n for n in importers if not n.startswith(allowed)}
    assert not strangers


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_file_is_longer_than_a_reader_takes_in(name):
    lines = len(modules()[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST or name in DATA
