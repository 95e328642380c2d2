"""run.py's promises: found or told why, whole or made anew, and nothing done twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")


def make_comfyui(folder: Path, version: str = "0.33.0") -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "__init__.py").touch()
    (folder / "main.py").touch()
    (folder / "requirements.txt").write_text("torch\n", encoding="utf-8")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py as a module, with every folder it looks at under tmp_path and no ComfyUI anywhere."""
    module = sys.modules["infinite_id_run"]  # loaded by tests/conftest.py
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.setattr(module, "ROOT", repository)
    monkeypatch.setattr(module, "LOCK", repository / "requirements.lock")
    module.LOCK.write_text("# nothing\n", encoding="utf-8")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name in ("COMFYUI_PATH", "XDG_CACHE_HOME", "LOCALAPPDATA", "INFINITE_ID_REQUIRE_HOST"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def work(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the set-up does, as words, in place of the minutes it takes."""
    done: list[str] = []

    def make_venv(environment: Any) -> None:
        done.append("venv")
        shutil.rmtree(environment.folder, ignore_errors=True)
        environment.python.parent.mkdir(parents=True)
        environment.python.touch()
        (environment.folder / "pyvenv.cfg").write_text("version = 3.11.7\n", encoding="utf-8")

    monkeypatch.setattr(run, "make_venv", make_venv)
    monkeypatch.setattr(run, "venv_starts", lambda environment: environment.python.exists())
    monkeypatch.setattr(run, "pip", lambda *arguments: done.append(Path(arguments[-1]).name))
    return done


# -- the environment -------------------------------------------------------------------------------


def test_second_run_installs_nothing(run: ModuleType, work: list[str]) -> None:
    run.ensure_venv(None)
    assert work == ["venv", "requirements.lock"]
    run.ensure_venv(None)
    assert work == ["venv", "requirements.lock"]


def test_changed_lock_is_installed_into_the_same_venv(run: ModuleType, work: list[str]) -> None:
    run.ensure_venv(None)
    run.LOCK.write_text("tqdm==4.70.1\n", encoding="utf-8")
    run.ensure_venv(None)
    assert work == ["venv", "requirements.lock", "requirements.lock"]


def test_killed_installation_is_made_anew(
    run: ModuleType, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "pip", killed)
        with pytest.raises(KeyboardInterrupt):
            run.ensure_venv(None)
    assert not run.environment_for(None).stamp.exists()
    run.ensure_venv(None)
    assert work == ["venv", "venv", "requirements.lock"]


def test_killed_update_is_not_taken_for_whole(
    run: ModuleType, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.ensure_venv(None)
    before = run.LOCK.read_bytes()
    run.LOCK.write_text("tqdm==4.70.1\n", encoding="utf-8")

    def failing(*_: str) -> None:
        raise run.SetupError("pip failed")

    with monkeypatch.context() as patch:
        patch.setattr(run, "pip", failing)
        with pytest.raises(run.SetupError):
            run.ensure_venv(None)
    run.LOCK.write_bytes(before)  # back to what the first stamp was for
    run.ensure_venv(None)
    assert work == ["venv", "requirements.lock", "venv", "requirements.lock"]


def test_two_releases_of_comfyui_do_not_disturb_one_another(
    run: ModuleType, work: list[str], tmp_path: Path
) -> None:
    """Another release brings its own requirements, into an environment of its own."""
    pinned = make_comfyui(tmp_path / "pinned", run.COMFYUI_RELEASE)
    floor = make_comfyui(tmp_path / "floor", "0.3.64")
    pythons = [run.ensure_venv(host) for host in (pinned, floor)]
    assert [python.parent.parent.name for python in pythons] == [".venv", ".venv-0.3.64"]
    whole = ["venv", "requirements.lock", "venv", "requirements.lock", "requirements.txt"]
    assert work == whole
    for host, python in zip((pinned, floor, pinned), (*pythons, pythons[0]), strict=True):
        assert run.ensure_venv(host) == python
    assert work == whole
    (floor / "requirements.txt").write_text("torch\neinops\n", encoding="utf-8")
    run.ensure_venv(floor)
    run.ensure_venv(pinned)
    assert work == [*whole, "requirements.lock", "requirements.txt"]


def test_killed_installation_for_one_host_leaves_the_other(
    run: ModuleType, work: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = make_comfyui(tmp_path / "floor", "0.3.64")
    run.ensure_venv(None)

    def failing(*_: object) -> None:
        raise run.SetupError("pip failed")

    with monkeypatch.context() as patch:
        patch.setattr(run, "pip", failing)
        with pytest.raises(run.SetupError):
            run.ensure_venv(floor)
    run.ensure_venv(None)
    assert work == ["venv", "requirements.lock", "venv"]
    run.ensure_venv(floor)
    assert work[3:] == ["venv", "requirements.lock", "requirements.txt"]


@pytest.mark.parametrize("version", ["../elsewhere", "", "0.40.0 (dev)"])
def test_no_version_leads_out_of_the_repository(
    run: ModuleType, tmp_path: Path, version: str
) -> None:
    folder = run.environment_for(make_comfyui(tmp_path / "odd", version)).folder
    assert folder.parent == run.ROOT and folder.name.startswith(".venv-")


def test_setup_hands_the_python_to_programs(
    run: ModuleType, work: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    host = make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
    assert run.main(["setup", "--release", run.comfyui_version(host)]) == 0
    assert capfd.readouterr().out == f"{run.environment_for(host).python}\n"


def test_setup_can_insist_on_a_release(
    run: ModuleType, work: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(make_comfyui(tmp_path / "floor", "0.3.64")))
    with pytest.raises(run.HostError, match=r"floor is ComfyUI 0\.3\.64, and this needs 0\.33"):
        run.main(["setup", "--release", "0.33.0"])
    assert work == []


def test_wrong_python_is_named(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.sys, "version_info", (3, 9, 1))
    with pytest.raises(run.SetupError, match=r"Python 3\.9 runs this.*3\.10 to 3\.14"):
        run.check_python()


# -- the host --------------------------------------------------------------------------------------


def test_named_host_wins(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
    named = make_comfyui(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert run.find_host() == named


def test_installed_pack_finds_its_own_comfyui(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
    around = make_comfyui(tmp_path / "ComfyUI")
    monkeypatch.setattr(run, "ROOT", around / "custom_nodes" / "infinite-id")
    assert run.find_host() == around


@pytest.mark.parametrize(
    ("made", "message"), [(False, "no such folder"), (True, "which is not a ComfyUI")]
)
def test_wrong_name_is_an_error(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool, message: str
) -> None:
    folder = tmp_path / "elsewhere"
    if made:
        folder.mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    with pytest.raises(run.HostError, match=f"{folder.name}.*{message}"):
        run.find_host()


def test_folder_that_is_no_comfyui_is_passed_over_by_name(
    run: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "home" / "comfy" / "ComfyUI"
    empty.mkdir(parents=True)
    assert run.find_host() is None
    assert str(empty) in capfd.readouterr().err


@needs_git
def test_clone_is_found_the_second_time(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = make_comfyui(tmp_path / "remote")
    git = ["git", "-C", str(remote), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    tag = f"v{run.COMFYUI_RELEASE}"
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", tag]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(run, "COMFYUI_URL", remote.as_uri())
    host = run.have_host()
    assert host == run.cached_host()
    assert run.have_host() == host
    assert [path.name for path in run.cache_folder().iterdir()] == [host.name]


@needs_git
def test_failed_clone_leaves_nothing(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "COMFYUI_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(run.HostError, match="cloning .*nowhere failed"):
        run.have_host()
    assert list(run.cache_folder().iterdir()) == []


def test_missing_git_is_named(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.shutil, "which", lambda _: None)
    with pytest.raises(run.HostError, match="Install git, or set COMFYUI_PATH"):
        run.have_host()


def test_required_host_that_is_missing_fails(
    run: ModuleType, work: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "gone"))
    children: list[dict[str, str]] = []
    monkeypatch.setattr(run, "run_child", lambda _, environment: children.append(environment) or 0)
    assert run.test([]) == 0
    assert "gone" in children[0]["INFINITE_ID_HOST_MISSING"]
    assert "COMFYUI_PATH" not in children[0]
    monkeypatch.setenv("INFINITE_ID_REQUIRE_HOST", "1")
    with pytest.raises(run.HostError):
        run.test([])
    assert len(children) == 1


@pytest.fixture
def children(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Any]]:
    """Commands and environments that would have been run."""
    started: list[tuple[list[str], Any]] = []

    def run_child(command: list[str], environment: dict[str, str]) -> int:
        started.append((list(command), environment))
        return 0

    monkeypatch.setattr(run, "run_child", run_child)
    return started


def test_demo_with_a_host_names_it(
    run: ModuleType, work: list[str], children: list[Any], tmp_path: Path
) -> None:
    host = make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
    assert run.main(["demo", "--seed", "3"]) == 0
    command, environment = children[0]
    assert command[command.index("--host") + 1] == str(host)
    assert command[command.index("--seed") + 1] == "3"
    assert "INFINITE_ID_HOST_MISSING" not in environment


def test_demo_without_a_host_does_without(
    run: ModuleType, work: list[str], children: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ComfyUI, and nothing to clone it with: the environment is made, the reason handed on."""
    monkeypatch.setattr(run.shutil, "which", lambda _: None)
    assert run.main(["demo", "--style", "neon"]) == 0
    assert work == ["venv", "requirements.lock"]
    command, environment = children[0]
    assert command[:3] == [str(run.environment_for(None).python), "-m", "tools.demo"]
    assert "--host" not in command
    assert command[command.index("--style") + 1] == "neon"
    reason = environment["INFINITE_ID_HOST_MISSING"]
    assert "Install git, or set COMFYUI_PATH" in reason and "\n" not in reason


def test_demo_can_insist_on_a_host(
    run: ModuleType, work: list[str], children: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFINITE_ID_REQUIRE_HOST", "1")
    monkeypatch.setattr(run.shutil, "which", lambda _: None)
    with pytest.raises(run.HostError):
        run.main(["demo"])
    assert work == [] and children == []


def test_demo_hands_on_how_it_ended(
    run: ModuleType, work: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
    monkeypatch.setattr(run, "run_child", lambda *_: 130)
    assert run.main(["demo"]) == 130


# -- tests that are left out -----------------------------------------------------------------------


def run_pytest(*files: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    ours = ("COMFYUI_PATH", "INFINITE_ID_")
    inherited: dict[str, Any] = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def pytest_without_host(**environment: str) -> subprocess.CompletedProcess[str]:
    files = ("tests/core/project/test_workflow_api.py", "tests/host/test_pack_loads.py")
    return run_pytest(*files, INFINITE_ID_HOST_MISSING="no network", **environment)


def test_missing_host_leaves_tests_out_and_says_how_many() -> None:
    done = pytest_without_host()
    assert done.returncode == 0, done.stdout
    assert "5 tests LEFT OUT: no ComfyUI: no network" in done.stdout
    assert " passed, 5 skipped" in done.stdout


def test_missing_host_can_be_a_failure() -> None:
    done = pytest_without_host(INFINITE_ID_REQUIRE_HOST="1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no ComfyUI: no network" in done.stderr


def test_every_test_that_is_left_out_can_be_a_failure(tmp_path: Path) -> None:
    """By a mark, in a test, in a fixture, or a whole file: each fails, and says why."""
    some = tmp_path / "test_some.py"
    some.write_text(
        "import pytest\n"
        "@pytest.fixture\ndef gone(): pytest.skip('reason three')\n"
        "@pytest.mark.skipif(True, reason='reason one')\ndef test_one(): pass\n"
        "def test_two(): pytest.skip('reason two')\n"
        "def test_three(gone): pass\n"
        "def test_four(): pass\n",
        encoding="utf-8",
    )
    whole = tmp_path / "test_whole.py"
    whole.write_text("import pytest\npytest.importorskip('no_such')\n", encoding="utf-8")
    ours = ("-p", "tests.conftest")
    arguments = (*ours, str(some), str(whole), "--continue-on-collection-errors")
    allowed = run_pytest(*arguments)
    assert allowed.returncode == 0, allowed.stdout
    reasons = ("reason one", "reason two", "reason three", "could not import 'no_such'")
    for reason in reasons:
        assert f"1 test LEFT OUT: {reason}" in allowed.stdout
    refused = run_pytest(*arguments, INFINITE_ID_REQUIRE_ALL="1")
    assert refused.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 1 passed, 3 errors" in refused.stdout
    for reason in reasons:
        assert f"INFINITE_ID_REQUIRE_ALL is 1, and this was left out: {reason}" in refused.stdout
