"""Sharing work in a folder: each of several processes, wherever it runs, takes what no other one works on.

A claim on `NAME` is the file `NAME.G`, which only one process can create. `G` counts holders: what a dead process left
as `NAME.0` is taken over by whoever creates `NAME.1`, so nobody ever deletes the claim of another one by mistake. The
holder keeps refreshing the file's time. It counts as dead when that time has not changed for `timeout` seconds on the
watcher's own monotonic clock, so it does not matter what the clocks of nodes and file server say, or that they jump;
and at once, when it ran here and its process is gone.

A process that was only paused comes back to a claim that another one took over, so two may do the same work: whatever
is made under a claim must be put in place in a way that stands that.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote

CLAIM = re.compile(r"(?P<name>.+)\.(?P<generation>\d+)")
BEATS_PER_TIMEOUT = 6


class Claims:
    """This process's claims on names in `folder`. A context manager: its thread refreshes them, its end releases them.

    `token` names this process in file names; `timeout` is in seconds.
    """

    def __init__(self, folder: Path, *, timeout: float) -> None:
        self.folder = folder
        self.timeout = timeout
        self.token = uuid.uuid4().hex
        self._held: dict[str, Path] = {}
        self._seen: dict[str, tuple[int, float]] = {}  # file name -> its time, and when we first saw that
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="claims", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for name in list(self._held):
            with suppress(OSError):  # what cannot be released is taken over
                self.release(name)

    def take(self, name: str) -> str | None:
        """Claim `name`: None when another one holds it, else the token of the dead process it was taken from, or ""."""
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = self._newest().get(name)
        if newest is not None and not self._is_dead(newest):
            return None
        path = self.folder / f"{quote(name, safe='')}.{0 if newest is None else _generation(newest) + 1}"
        try:
            with path.open("x") as file:
                self._held[name] = path
                json.dump({"token": self.token, **_this_process()}, file)
        except FileExistsError:
            return None
        if newest is None:
            return ""
        before = str(_read(newest).get("token", ""))
        newest.unlink(missing_ok=True)
        return before

    def release(self, name: str) -> None:
        self._held.pop(name).unlink(missing_ok=True)

    def taken(self) -> set[str]:
        """Names that a living process holds, this one among them."""
        return {name for name, path in self._newest().items() if not self._is_dead(path)}

    def _newest(self) -> dict[str, Path]:
        """The claim in force for every name that has one."""
        found: dict[str, Path] = {}
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                claim = CLAIM.fullmatch(entry.name)
                if claim is not None:
                    name, path = unquote(claim["name"]), Path(entry.path)
                    if name not in found or _generation(found[name]) < _generation(path):
                        found[name] = path
        return found

    def _is_dead(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:  # opening makes NFS ask the server for the time
                refreshed = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False  # released just now; the next look tells
        if path in list(self._held.values()):
            return False
        if _is_gone(_read(path)):
            return True
        now = time.monotonic()
        before, since = self._seen.get(path.name, (None, now))
        if before != refreshed:
            since = now
        self._seen[path.name] = refreshed, since
        return now - since > self.timeout

    def _refresh(self) -> None:
        while not self._stop.wait(self.timeout / BEATS_PER_TIMEOUT):
            for path in list(self._held.values()):
                with suppress(OSError):  # taken over, or a server that is away for a while
                    os.utime(path)


def _generation(path: Path) -> int:
    return int(path.name.rpartition(".")[2])


def _read(path: Path) -> dict[str, Any]:
    """The content of a claim; empty while its holder is writing it, and after its release."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _this_process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _start_time(os.getpid()), "since": time.time()}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a process that ran here, where its number means something, is no more; False for all others."""
    started = holder.get("started")
    return started is not None and holder.get("host") == _host() and _start_time(holder.get("pid")) != started


def _host() -> str:
    """This machine since it was started, and the container in it: two with one name are told apart."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def _start_time(pid: object) -> str | None:
    """When a process was started, in ticks since boot; None when it has ended, or the system does not tell."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
