"""Test set-up shared by all three layers: where the host is, and what to say where it is not."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
HOST_LAYERS = ("host", "server")

ALL = "INFINITE_ID_REQUIRE_ALL"
ALL_REQUIRED = os.environ.get(ALL) == "1"  # .ci/run: no test may be left out

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# At the END: ComfyUI has a top-level module `nodes`, and ours must never hide it.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

# Nothing is downloaded by a test, whatever library would like to.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Before torch is loaded: spinning threads are ruinous for tiny models on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _load_run() -> ModuleType:
    """run.py by its path: it holds the one finder of the host."""
    spec = importlib.util.spec_from_file_location("infinite_id_run", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _find_host() -> tuple[Path | None, str]:
    """The host's folder, or None and the reason."""
    run = _load_run()
    reason = os.environ.get("INFINITE_ID_HOST_MISSING")  # run.py has already tried to clone it
    if reason:
        return None, reason
    try:
        host = run.find_host()
    except run.HostError as error:
        return None, str(error)
    if host is None:
        return None, "no ComfyUI found; set COMFYUI_PATH to its folder"
    return host, ""


HOST, HOST_MISSING = _find_host()
if HOST is not None:
    os.environ["COMFYUI_PATH"] = str(HOST)  # for tests/host and tests/server, and their children


class RootIsNoPackage:
    """Keeps pytest from importing the pack's `__init__.py` as a test package."""

    @pytest.hookimpl
    def pytest_collect_directory(
        self, path: Path, parent: pytest.Collector
    ) -> pytest.Collector | None:
        if path == ROOT:
            directory: pytest.Collector = pytest.Dir.from_parent(parent, path=path)
            return directory
        return None


class UnreadModule(pytest.File):
    """A host test file where there is no host: its tests are named without importing it."""

    def collect(self) -> Iterator[pytest.Item]:
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                yield SkippedTest.from_parent(self, name=node.name)


class SkippedTest(pytest.Item):
    """One test that cannot run without the host."""

    def setup(self) -> NoReturn:
        pytest.skip(f"no ComfyUI: {HOST_MISSING}")

    def runtest(self) -> None:  # pragma: no cover - setup always skips
        raise AssertionError("unreachable")


def _layer(path: Path) -> str | None:
    """'host' or 'server' for a file of that layer, else None."""
    try:
        first = path.relative_to(TESTS).parts[0]
    except (ValueError, IndexError):
        return None
    return first if first in HOST_LAYERS else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoPackage(), "root-is-no-package")
    if HOST is None and os.environ.get("INFINITE_ID_REQUIRE_HOST") == "1":
        raise pytest.UsageError(f"INFINITE_ID_REQUIRE_HOST=1 and no ComfyUI: {HOST_MISSING}")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Collector | None:
    if HOST is None and _layer(module_path):
        unread: pytest.Collector = UnreadModule.from_parent(parent, path=module_path)
        return unread
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        layer = _layer(item.path)
        if layer:
            item.add_marker(layer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that was left out, where all have to run, has failed."""
    return _refused((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole file."""
    return _refused((yield))


def _refused(report: Report) -> Report:
    if report.skipped and not hasattr(report, "wasxfail") and ALL_REQUIRED:
        report.outcome = "failed"
        report.longrepr = f"{ALL} is 1, and this was left out: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped."""
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which ComfyUI it was, and how many tests were left out, by reason."""
    if HOST is not None:
        terminalreporter.write_line(f"ComfyUI: {HOST}")
    reasons = Counter(_reason(report) for report in terminalreporter.getreports("skipped"))
    for reason, number in reasons.most_common():
        tests = "1 test" if number == 1 else f"{number} tests"
        terminalreporter.write_line(f"{tests} LEFT OUT: {reason}", yellow=True, bold=True)
