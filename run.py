#!/usr/bin/env python3
"""Run Infinite-ID without setting anything up first.

    python run.py demo     one person in four scenes and styles, painted by a live ComfyUI with the
                           embedded default models; where it cannot be had, by diffusers
    python run.py test     all tests; arguments go to pytest (paths from the repository's root)
    python run.py setup    only what both need: the virtual environment and ComfyUI

Standard library only. What is missing is made (.venv beside this file) or cloned (ComfyUI, into
the user's cache folder); what is there is used, and a second run starts in about a second. A
ComfyUI of another release than the one named below gets an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOCK = ROOT / "requirements.lock"

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 14)  # what requirements.lock has wheels for

COMFYUI_URL = "https://github.com/comfyanonymous/ComfyUI"
COMFYUI_RELEASE = "0.33.0"  # requirements.lock holds this release's requirements
ROOM_NEEDED = 9 * 2**30  # bytes; torch with CUDA's libraries is most of it (Linux)


class SetupError(Exception):
    """Something the set-up needs is missing; the message says what to do."""


class HostError(SetupError):
    """ComfyUI is not where it was said to be, or cannot be had."""


def say(text: str) -> None:
    print(f"[infinite-id] {text}", file=sys.stderr, flush=True)


# -- ComfyUI ---------------------------------------------------------------------------------------


def is_comfyui(folder: Path) -> bool:
    return (folder / "comfy").is_dir() and (folder / "main.py").is_file()


def comfyui_version(folder: Path) -> str:
    """The release a ComfyUI folder holds, or 'unknown'."""
    with contextlib.suppress(OSError):
        for line in (folder / "comfyui_version.py").read_text(encoding="utf-8").splitlines():
            if line.startswith("__version__"):
                return line.split("=", 1)[1].strip().strip("\"'")
    return "unknown"


def cache_folder() -> Path:
    """Where this platform keeps what a program can make again."""
    home = Path.home()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "infinite-id"


def cached_host() -> Path:
    return cache_folder() / f"ComfyUI-{COMFYUI_RELEASE}"


def find_host() -> Path | None:
    """ComfyUI's folder: $COMFYUI_PATH, else the one we are installed in, else the usual places.

    Raises HostError where COMFYUI_PATH is set, and no ComfyUI is there.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().resolve()
        if is_comfyui(folder):
            return folder
        problem = ": no such folder"
        if folder.is_dir():
            problem = (
                ", which is not a ComfyUI: it has to hold the folder comfy and the file main.py"
            )
        raise HostError(
            f"COMFYUI_PATH is {folder}{problem}. Set it to a ComfyUI folder, or unset it to have "
            "one found or cloned."
        )
    candidates = [Path.home() / "comfy" / "ComfyUI", cached_host()]
    if ROOT.parent.name == "custom_nodes":
        candidates.insert(0, ROOT.parent.parent)
    for folder in candidates:
        if is_comfyui(folder):
            return folder
        if folder.is_dir():
            say(
                f"{folder} is not a ComfyUI (no folder comfy with a main.py beside it): passed over"
            )
    return None


def clone_host() -> Path:
    """Clone the pinned ComfyUI release into the cache folder; whole or not at all.

    Raises HostError: no git, no network, or the folder is taken by something else.
    """
    target = cached_host()
    if target.exists() and not is_comfyui(target):
        raise HostError(f"{target} is in the way: it is not a ComfyUI. Remove it and run again.")
    if shutil.which("git") is None:
        raise HostError(
            "ComfyUI was not found, and git, which would fetch it, is not installed. "
            "Install git, or set COMFYUI_PATH to a ComfyUI folder."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"cloning ComfyUI {COMFYUI_RELEASE} into {target} (about 60 MB)")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="clone-") as folder:
        fresh = Path(folder) / "ComfyUI"
        command = ["git", "-c", "advice.detachedHead=false"]
        # A network that swallows packets would hang for ever.
        command += ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30"]
        command += ["clone", "--depth", "1", "--branch", f"v{COMFYUI_RELEASE}"]
        done = subprocess.run(
            [*command, COMFYUI_URL, str(fresh)],
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
            check=False,
        )
        if done.returncode != 0 or not is_comfyui(fresh):
            raise HostError(
                f"ComfyUI was not found, and cloning {COMFYUI_URL} failed (git's exit code "
                f"{done.returncode}). With a network, run again; or set COMFYUI_PATH to a "
                "ComfyUI folder."
            )
        try:
            fresh.rename(target)
        except OSError:
            if not is_comfyui(target):  # else another run of ours was first
                raise
    return target


def have_host() -> Path:
    """Find ComfyUI or clone it. Raises HostError where neither worked."""
    return find_host() or clone_host()


# -- The virtual environment -----------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """A virtual environment beside this file, for one release of ComfyUI."""

    folder: Path
    files: tuple[Path, ...]
    """What pip installs into it, one after the other."""

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def stamp(self) -> Path:
        """Names what was installed."""
        return self.folder / "infinite-id.stamp"

    @property
    def unfinished(self) -> Path:
        """Stands while pip works: an installation that was killed is never taken for a whole."""
        return self.folder / "infinite-id.unfinished"


def environment_for(host: Path | None) -> Environment:
    """The environment of a host: two releases of ComfyUI on one machine have one each.

    It holds the lock and, for another release than the lock's, that host's own list on top.
    """
    version = COMFYUI_RELEASE if host is None else comfyui_version(host)
    if host is None or version == COMFYUI_RELEASE:
        return Environment(ROOT / ".venv", (LOCK,))
    own = host / "requirements.txt"
    folder = ROOT / f".venv-{re.sub('[^A-Za-z0-9.+-]', '_', version)}"
    return Environment(folder, (LOCK, own) if own.is_file() else (LOCK,))


def check_python() -> None:
    """Raises SetupError where no torch of the lock exists for this interpreter or machine."""
    here = sys.version_info[:2]
    if not OLDEST_PYTHON <= here <= NEWEST_PYTHON:
        wanted = f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} to {NEWEST_PYTHON[0]}.{NEWEST_PYTHON[1]}"
        raise SetupError(
            f"Python {here[0]}.{here[1]} runs this, and requirements.lock is for Python {wanted}. "
            "Start run.py with one of those."
        )
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise SetupError("torch is no longer made for Macs with Intel processors.")


def fingerprint(environment: Environment) -> str:
    """Changes with its Python, with the lock, and with a foreign host's requirements."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        digest.update((environment.folder / "pyvenv.cfg").read_bytes())
    for file in environment.files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def venv_starts(environment: Environment) -> bool:
    """Whether the environment's Python runs, is of a fitting version and has pip."""
    fits = f"{OLDEST_PYTHON} <= sys.version_info[:2] <= {NEWEST_PYTHON}"
    command = [str(environment.python), "-c", f"import sys, pip; sys.exit(not {fits})"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def ensure_venv(host: Path | None) -> Path:
    """Make a host's environment hold exactly what its lists say; returns its Python.

    Raises SetupError where there is no fitting Python, or pip failed.
    """
    wanted = environment_for(host)
    begun = wanted.python.exists() and not wanted.unfinished.exists()
    stamp = wanted.stamp.read_text(encoding="utf-8") if wanted.stamp.is_file() else None
    if begun and stamp == fingerprint(wanted):
        return wanted.python
    if not (begun and venv_starts(wanted)):
        make_venv(wanted)
    wanted.stamp.unlink(missing_ok=True)
    wanted.unfinished.touch()
    for file in wanted.files:
        say(f"installing {file} (the first time 2 to 5 minutes and several GB)")
        pip(wanted, "install", "--disable-pip-version-check", "--requirement", str(file))
    wanted.stamp.write_text(fingerprint(wanted), encoding="utf-8")
    wanted.unfinished.unlink()
    return wanted.python


def make_venv(environment: Environment) -> None:
    check_python()
    free = shutil.disk_usage(ROOT).free
    if sys.platform == "linux" and free < ROOM_NEEDED:
        say(f"only {free / 2**30:.1f} GB are free here; the environment takes about 7")
    say(f"making the virtual environment {environment.folder}")
    command = [sys.executable, "-m", "venv", "--clear", str(environment.folder)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SetupError(
            f"'{sys.executable} -m venv' failed. On Debian and Ubuntu: apt install python3-venv."
        )


def pip(environment: Environment, *arguments: str) -> None:
    command = [str(environment.python), "-m", "pip", *arguments]
    # What it says is for the reader; our standard output is for programs.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise SetupError(
            f"pip failed (exit code {done.returncode}); what it said is above. "
            "Run again once that is mended: the installation then starts afresh."
        )


# -- The verbs -------------------------------------------------------------------------------------


def run_child(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a program to its end; Ctrl-C and SIGTERM end it in its own way, and we wait for that."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the child as well
            continue


def setup(release: str | None = None) -> int:
    """Make everything ready; the Python that is to be used goes to standard output.

    Raises HostError: there is no ComfyUI, or another release than the one that has to be there.
    """
    host = have_host()
    version = comfyui_version(host)
    if release not in (None, version):
        raise HostError(
            f"{host} is ComfyUI {version}, and this needs {release}. Set COMFYUI_PATH to a folder "
            f"that holds {release}."
        )
    python = ensure_venv(host)
    say(f"ready: ComfyUI {version} in {host}, Python in {python.parent.parent}")
    print(python)
    return 0


def host_for_child() -> tuple[Path | None, dict[str, str]]:
    """ComfyUI, or None where it cannot be had, and the environment that tells a child which.

    Raises HostError where it cannot be had, and INFINITE_ID_REQUIRE_HOST is 1.
    """
    environment = dict(os.environ)
    try:
        host = have_host()
    except HostError as error:
        if os.environ.get("INFINITE_ID_REQUIRE_HOST") == "1":
            raise
        environment.pop("COMFYUI_PATH", None)
        environment["INFINITE_ID_HOST_MISSING"] = str(error)
        return None, environment
    environment["COMFYUI_PATH"] = str(host)
    environment.pop("INFINITE_ID_HOST_MISSING", None)
    return host, environment


def test(pytest_arguments: Sequence[str]) -> int:
    host, environment = host_for_child()
    if host is None:
        say(f"{environment['INFINITE_ID_HOST_MISSING']} Host and server tests will be left out.")
    python = ensure_venv(host)
    return run_child([str(python), "-m", "pytest", *pytest_arguments], environment)


def demo(options: argparse.Namespace) -> int:
    if options.reference is not None and not options.reference.is_file():
        raise SetupError(f"--reference {options.reference}: no such file.")
    host, environment = host_for_child()  # without a host the child says so, and does without
    python = ensure_venv(host)
    command = [str(python), "-m", "tools.demo"]
    if host is not None:
        command += ["--host", str(host)]
    for name in ("reference", "prompt", "style", "seed", "output", "port"):
        value = getattr(options, name)
        if value is not None:
            command += [f"--{name}", str(value.resolve() if isinstance(value, Path) else value)]
    return run_child(command, environment)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="run.py", description="Infinite-ID for ComfyUI: demo and tests, set-up included."
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    made_ready = verbs.add_parser(
        "setup", help="make the environment and find or clone ComfyUI, nothing else"
    )
    made_ready.add_argument(
        "--release", metavar="VERSION", help="fail where the ComfyUI that is found is another one"
    )
    # Its arguments are pytest's: main() splits them off before argparse sees them.
    verbs.add_parser("test", help="run all tests; further arguments go to pytest", add_help=False)
    shown = verbs.add_parser("demo", help="one person in four scenes and styles, from ComfyUI")
    shown.add_argument(
        "--reference", type=Path, metavar="FILE", help="a photo of one person; default: a made one"
    )
    shown.add_argument("--prompt", metavar="TEXT", help="one picture, of this")
    shown.add_argument(
        "--style", metavar="NAME", help="one picture, in this style: photo, sketch, sepia, neon"
    )
    shown.add_argument("--seed", type=int, metavar="N", help="other pictures of the same person")
    shown.add_argument(
        "--output", type=Path, metavar="DIR", default=ROOT / "output", help="default: output/"
    )
    shown.add_argument("--port", type=int, metavar="N", help="ComfyUI's port; default: a free one")
    return made


def main(arguments: Sequence[str]) -> int:
    if sys.version_info < OLDEST_PYTHON:
        check_python()
    if arguments[:1] == ["test"]:
        return test(arguments[1:])
    options = parser().parse_args(arguments)
    return setup(options.release) if options.verb == "setup" else demo(options)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as problem:
        say(f"{type(problem).__name__}: {problem}")
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
