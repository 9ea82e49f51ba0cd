"""The lease on a run folder: of two runs that are given the same folder, one trains.

`lease.json` in the folder says which process holds it. The holder renews it every few seconds, and looks at it before it publishes anything:
a process that was thought dead and wakes up finds another's token there, and ends.

    holder on this machine       held exactly as long as that process lives, known by its pid and start time
    holder that cannot be seen   held if the file changes while it is watched for the time to live, else given up

Not to be seen are processes of another machine, and those of other users where the system hides them. Clocks of two hosts are never compared.
"""

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from spade_t5.checkpoint.manifest import whole_file
from spade_t5.errors import ConfigError, RunAbortedError
from spade_t5.training.watchdog import process_start

logger = logging.getLogger("spade_t5")

LEASE_FILE = "lease.json"
TIME_TO_LIVE_SECONDS = 60.0
"""A lease whose holder cannot be seen and that is not renewed for so long is taken over."""
_RENEWALS_IN_A_LIFE = 20
_SETTLING_SECONDS = 0.3
"""Two processes that take over at the same moment have both written by then; the last one has it."""

_REREADING_SECONDS = 0.1
_FILE_BYTES = 1024
"""Length of every lease file, blanks included: what is written over another one leaves nothing of it behind."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease."""

    host: str
    """Its name."""
    machine: str
    """Boot and process-id namespace, within which a pid and a start time name one process; empty where the system does not tell."""
    pid: int
    """Process id of the main rank."""
    started: str
    """When that process started, in clock ticks since the boot."""
    token: str
    """Random, of this holding of the lease."""
    renewed: float
    """Last sign of life, in seconds since 1970 by the holder's clock."""

    @classmethod
    def this_process(cls) -> Self:
        """This process, with a new token."""
        pid = os.getpid()
        return cls(os.uname().nodename, _machine(), pid, process_start(pid) or "", secrets.token_hex(16), time.time())

    @classmethod
    def parse(cls, content: bytes) -> Self | None:
        """The holder that a lease file names; None if the file is torn or foreign."""
        try:
            fields = json.loads(content)
            kinds = {field.name: field.type for field in dataclasses.fields(cls)}
            if fields.keys() != kinds.keys() or not all(isinstance(fields[name], kinds[name]) for name in kinds):  # type: ignore[arg-type]
                return None
            return cls(**fields)
        except (ValueError, AttributeError):
            return None

    @property
    def is_on_this_machine(self) -> bool:
        """Whether its process id can be looked up here."""
        return (self.host, self.machine) == (os.uname().nodename, _machine()) and self.machine != ""

    @property
    def is_alive(self) -> bool | None:
        """Of a holder on this machine: whether that very process runs; None if the system hides it from this user."""
        found = process_start(self.pid)
        if found is not None:
            return found == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # there is a process, of another user
        return False if os.access(f"/proc/{self.pid}/stat", os.R_OK) else None  # a zombie can be looked at

    def __str__(self) -> str:
        """As messages name it."""
        return f"{self.host}:{self.pid}"


class Lease:
    """This process's hold on a folder, from `take` to `release`."""

    def __init__(
        self, folder: Path, *, on_loss: Callable[[], None], time_to_live_seconds: float = TIME_TO_LIVE_SECONDS
    ) -> None:
        """Nothing is taken yet.

        Args:
            folder: an existing folder.
            on_loss: called once, from the renewing thread, when another process has the lease or the folder is gone.
            time_to_live_seconds: how long a lease of another machine is watched before it is taken over.
        """
        self._folder = folder
        self._path = folder / LEASE_FILE
        self._on_loss = on_loss
        self._life_seconds = time_to_live_seconds
        self._own = Holder.this_process()
        self._thread: threading.Thread | None = None
        self._file_lock = threading.Lock()
        """Held while this process writes its sign of life, so that it does not read half of it."""
        self._is_released = threading.Event()

    def take(self) -> None:
        """Takes the lease, waiting for the time to live where its holder may be dead, and renews it from then on.

        Raises:
            ConfigError: another process holds it, or the folder cannot be written.
        """
        try:
            while not self._create():
                self._take_over()
                if self._problem() is None:
                    break
        except OSError as error:
            raise ConfigError(
                f"run_dir: {self._folder} cannot be written ({error.strerror}); choose another folder"
            ) from None
        self._thread = threading.Thread(target=self._renew_until_released, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> dict[str, Any]:
        """What a manifest says of the lease.

        Raises:
            RunAbortedError: it is lost, or cannot be seen.
        """
        problem = self._problem()
        if problem is not None:
            raise RunAbortedError(problem)
        return {"lease": self._own.token}

    def release(self) -> None:
        """Gives the lease back, if it is still this process's. On a disk that fails it stays, and is taken over."""
        self._is_released.set()
        if self._thread is not None:
            self._thread.join()
            if self._problem() is None:
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Makes the file; False if there is one."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._content())
            os.fsync(descriptor)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _take_over(self) -> None:
        """Puts this process into a lease whose holder is dead; leaves a lease that has vanished alone.

        Raises:
            ConfigError: the holder lives, or another process was faster.
        """
        before = self._read()
        if before is None:
            return
        holder = Holder.parse(before)
        is_alive = holder.is_alive if holder is not None and holder.is_on_this_machine else None
        if is_alive:
            raise self._refusal(holder)
        if is_alive is None and not self._is_given_up(before, holder):
            return
        if self._read() != before:
            return
        with whole_file(self._path) as file:
            file.write(self._content())
        time.sleep(_SETTLING_SECONDS)
        now = self._read()
        winner = None if now is None else Holder.parse(now)
        if winner is not None and winner.token != self._own.token:
            raise self._refusal(winner)
        logger.info("took over the lease of %s, which is gone", holder or "an unknown process")

    def _is_given_up(self, before: bytes, holder: Holder | None) -> bool:
        """Watches a lease that cannot be looked up; False if it is released meanwhile.

        Raises:
            ConfigError: it is renewed.
        """
        logger.info(
            "%s is held by %s: watching for %.0f s whether that is alive",
            self._path,
            holder or "an unknown process",
            self._life_seconds,
        )
        until = time.monotonic() + self._life_seconds
        while time.monotonic() < until:
            time.sleep(min(0.5, self._life_seconds / _RENEWALS_IN_A_LIFE))
            now = self._read()
            if now is None:
                return False
            if now != before:
                raise self._refusal(Holder.parse(now) or holder)
        return True

    def _renew_until_released(self) -> None:
        while not self._is_released.wait(self._life_seconds / _RENEWALS_IN_A_LIFE):
            if not self._renew() and (problem := self._problem()) is not None:
                logger.error("%s", problem)
                self._on_loss()
                return

    def _renew(self) -> bool:
        """Gives a sign of life; False if the lease is lost. A file system that fails for a while is no loss.

        It is written in place: that needs no space, and what another process puts there by a rename is never overwritten.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            holder = Holder.parse(os.read(descriptor, 4096))
            if holder is None or holder.token != self._own.token:
                return False
            with self._file_lock:
                os.pwrite(descriptor, self._content(), 0)
            os.fsync(descriptor)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return True

    def _problem(self) -> str | None:
        """Why the lease is not this process's, if it is not."""
        try:
            with self._file_lock:
                content = self._read()
            if content is not None and Holder.parse(content) is None:  # a network file system may show half of a write
                time.sleep(_REREADING_SECONDS)
                content = self._read()
        except OSError as error:
            return f"lease: {self._path} cannot be read ({error.strerror}), so nothing more is saved; see to the disk and start the run again"
        if content is None:
            return f"lease: {self._path} is gone, so nothing more is saved; see what removed it and start the run again"
        holder = Holder.parse(content)
        if holder is None or holder.token != self._own.token:
            return (
                f"lease: {holder or 'another process'} has taken over {self._folder}, so nothing more is saved here; "
                "one run in a folder is enough"
            )
        return None

    def _content(self) -> bytes:
        fields = dataclasses.asdict(dataclasses.replace(self._own, renewed=time.time()))
        return json.dumps(fields).encode().ljust(_FILE_BYTES)

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _refusal(self, holder: Holder | None) -> ConfigError:
        return ConfigError(
            f"run_dir: {self._folder} is in use by {holder or 'another process'}; wait for that run or stop it, or choose another run_dir"
        )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
