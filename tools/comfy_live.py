"""A ComfyUI server of our own: started, ready to be spoken to, and always stopped."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import requests

from .comfy_client import ComfyClient, ServerDied

PACK_FOLDER = "infinite-id"
_NOT_COPIED = (".git", ".venv*", "output", "runs")  # at the top of the repository
_READY_TIMEOUT = 480.0  # seconds; seven on an idle machine, minutes on a very busy one
_STOP_TIMEOUT = 15.0


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def copy_pack(source: Path, target: Path) -> Path:
    """Copy the pack as a user's custom_nodes folder would hold it; returns `target`."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        made = {name for name in names if name == "__pycache__" or name.endswith("_cache")}
        if Path(folder) == source:
            made |= {name for pattern in _NOT_COPIED for name in fnmatch.filter(names, pattern)}
        return made

    return Path(shutil.copytree(source, target, ignore=ignore))


def host_knows(host: Path, flag: str) -> bool:
    """Whether this ComfyUI has the command-line flag: they come and go between versions."""
    text = (host / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    return f'"{flag}"' in text


def has_accelerator() -> bool:
    """Whether torch sees a device other than the CPU."""
    import torch

    return bool(
        torch.cuda.is_available()
        or torch.backends.mps.is_available()
        or (hasattr(torch, "xpu") and torch.xpu.is_available())
    )


class ComfyServer(ComfyClient):
    """ComfyUI as a child process in a base directory of its own.

    Use as a context manager: leaving it stops the process and removes a temporary base directory.

    Args:
        host: ComfyUI's folder (with main.py).
        pack: folder of a node pack, copied to custom_nodes/infinite-id; None for plain ComfyUI.
        base: ComfyUI's base directory (models, input, output, ...); made and removed when None.
        port: a free one when None.
        cpu: pass --cpu; None decides by what torch sees.
        extra_args: further command-line arguments, e.g. ("--lowvram",).
    """

    def __init__(
        self,
        *,
        host: Path,
        pack: Path | None = None,
        base: Path | None = None,
        port: int | None = None,
        cpu: bool | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.host = Path(host).resolve()
        super().__init__(port or free_port())
        self._own_base = base is None
        self.base = Path(base or tempfile.mkdtemp(prefix="infinite-id-comfy-")).resolve()
        self.log_path = self.base / "server.log"
        self._pack = pack
        self._cpu = cpu
        self._extra = tuple(extra_args)
        self._process: subprocess.Popen[bytes] | None = None

    # -- life ------------------------------------------------------------------------------------

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    def start(
        self,
        *,
        timeout: float = _READY_TIMEOUT,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        """Start the server and return once it answers.

        Args:
            timeout: seconds to wait for it.
            on_wait: called about twice a second with the seconds waited so far.

        Raises:
            ServerDied: it ended, or did not answer in time; the end of its log is in the message.
        """
        try:
            self._prepare_base()
            self._spawn()
            self._await_ready(timeout, on_wait)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process and remove a temporary base directory. Safe to call twice."""
        self.close()
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._own_base:
            shutil.rmtree(self.base, ignore_errors=True)

    def log_tail(self, lines: int = 40) -> str:
        """The end of the server's log."""
        try:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _prepare_base(self) -> None:
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self._pack is not None:
            target = self.base / "custom_nodes" / PACK_FOLDER
            shutil.rmtree(target, ignore_errors=True)
            copy_pack(self._pack, target)

    def _arguments(self) -> list[str]:
        arguments = [
            str(self.host / "main.py"),
            *("--listen", "127.0.0.1", "--port", str(self.port)),
            *("--base-directory", str(self.base)),
            "--disable-auto-launch",
        ]
        if self._cpu if self._cpu is not None else not has_accelerator():
            arguments.append("--cpu")
        if host_knows(self.host, "--disable-api-nodes"):  # they ask a server for their prices
            arguments.append("--disable-api-nodes")
        if host_knows(self.host, "--database-url"):  # else it is written into the host's folder
            database = (self.base / "user" / "comfyui.db").as_posix()
            arguments += ["--database-url", f"sqlite:///{database}"]
        return [*arguments, *self._extra]

    def _spawn(self) -> None:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        # Small models on a busy CPU: threads that spin while they wait made a sampling run of
        # 2 s take minutes. Whoever has set this keeps it.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        environment.pop("PYTHONPATH", None)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._arguments()],
                cwd=self.host,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C goes to us alone, so that stop() decides how the server ends.
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )

    def _await_ready(self, timeout: float, on_wait: Callable[[float], None] | None) -> None:
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < timeout:
            self.check_alive("before it was ready")
            with contextlib.suppress(requests.RequestException):
                if self._http.get(f"{self.url}/system_stats", timeout=5).ok:
                    return
            if on_wait is not None:
                on_wait(waited)
            time.sleep(0.4)
        raise ServerDied(
            f"ComfyUI is running and did not answer on {self.url} in {timeout:.0f} s. On a busy "
            "machine, run again when it is quieter; else the end of its log tells what it waits "
            "for:\n" + self.log_tail()
        )

    def check_alive(self, when: str) -> None:
        """Raises `ServerDied`, with the end of its log, where the process is not there."""
        if self._process is None:
            raise ServerDied("The server is not running: call start() first.")
        code = self._process.poll()
        if code is not None:
            raise ServerDied(
                f"ComfyUI ended with exit code {code} {when}. The end of its log:\n"
                + self.log_tail()
            )
