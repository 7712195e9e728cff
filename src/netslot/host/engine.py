"""What operations on a host share: state directory, ledger, spec, templates, a thread in the root namespace."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from netslot.errors import KernelError, NetslotError, RefusedError, UsageError
from netslot.host import templates
from netslot.host.ledger import Ledger
from netslot.host.plan import SlotPlan, parse_tag
from netslot.host.root import Snapshot
from netslot.host.slots import Template, Workshop
from netslot.kernel import netns
from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import Socket
from netslot.spec.load import parse
from netslot.spec.model import ClassSpec, HostSpec
from netslot.spec.roster import numbered

T = TypeVar("T")

DEFAULT_STATE_DIR = Path("/run/netslot")

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit systems: type, whence, start, length, pid
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Engine:
    """One host, opened. Kernel work happens on its worker thread, one piece after another.

    ``root_netns`` names the root namespace as ``ip netns`` knows it; None is the caller's own, or the one that the
    host was made with.
    """

    def __init__(self, state_dir: Path, root_netns: str | None = None, *, ledger: Ledger | None = None) -> None:
        self.state_dir = state_dir
        self.root_netns = root_netns
        self._lock = threading.RLock()
        self._ledger = ledger
        self._owns_ledger = ledger is None
        self._slot_locks = -1
        self._worker: netns.Worker | None = None
        self._workshop: Workshop | None = None
        self._spec: HostSpec | None = None
        self._spec_digest = ""
        self._host_id = ""
        self._templates: dict[str, Template] = {}

    def close(self) -> None:
        """Let go of everything; slots and leases stay."""
        with self._lock:
            if self._worker is not None:
                if self._workshop is not None:
                    self._worker.run(self._workshop.close)
                self._worker.close()
            if self._ledger is not None and self._owns_ledger:
                self._ledger.close()
            if self._slot_locks >= 0:
                os.close(self._slot_locks)
                self._slot_locks = -1
            self._worker = self._workshop = self._ledger = None
            self._templates.clear()  # and with them the BPF programs that slots share

    def beside(self) -> Engine:
        """A second engine of the same host, with a worker thread of its own, for work that this must not wait for.

        It shares the ledger: close it before this one.
        """
        return Engine(self.state_dir, self.root_netns, ledger=self.ledger)

    # --- the state directory -------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether ``up`` has ever run with this state directory since the machine was booted."""
        return (self.state_dir / "ledger.db").exists()

    @property
    def ledger(self) -> Ledger:
        """The ledger. RefusedError when there is no host here."""
        with self._lock:
            if self._ledger is None:
                if not self.exists:
                    raise RefusedError(f"there is no host in {self.state_dir}", hint="netslot up SPEC makes one")
                self._ledger = Ledger(self.state_dir / "ledger.db")
                self._forget_other_boot(self._ledger)
            return self._ledger

    def create(self) -> Ledger:
        """Open the ledger, making the state directory and a new host identity if need be."""
        try:
            self.state_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise NetslotError(
                f"cannot make {self.state_dir}: {error.strerror}", hint="name another with --state-dir"
            ) from error
        with self._lock:
            if self._ledger is None:
                self._ledger = Ledger(self.state_dir / "ledger.db")
                self._forget_other_boot(self._ledger)
            if self._ledger.get("host") is None:
                self._ledger.put(host=self._surviving_identity() or secrets.token_hex(4), boot=_boot())
            return self._ledger

    def _surviving_identity(self) -> str | None:
        """Identity of the host whose slots outlived their ledger, read from the file that is written beside it."""
        try:
            return (self.state_dir / "identity").read_text(encoding="ascii").strip() or None
        except FileNotFoundError:
            return None

    def write_identity(self) -> None:
        """Keep what is needed to recognise the host's slots without the ledger: identity, spec, root's rules."""
        facts = {key: self.ledger.get(key) for key in ("spec", "spec_digest", "root")}
        for name, text in (("identity", self.host_id), ("facts.json", json.dumps(facts))):
            partial = self.state_dir / f".{name}"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.state_dir / name)

    def recover_facts(self) -> None:
        """After the ledger was lost: take spec and root snapshot from the file beside it."""
        try:
            facts = json.loads((self.state_dir / "facts.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return
        known = {key: value for key, value in facts.items() if value and self.ledger.get(key) is None}
        if known:
            self.ledger.put(**known)

    def _forget_other_boot(self, ledger: Ledger) -> None:
        """Namespaces do not outlive a boot, so neither does what is written about them."""
        boot = ledger.get("boot")
        if boot is not None and boot != _boot():
            ledger.forget([record.slot for record in ledger.slots()])
            ledger.put(boot=_boot(), root="")

    @property
    def host_id(self) -> str:
        """What tells this host's slots from another's on the same machine; it stays while the host is there."""
        if not self._host_id:
            self._host_id = self.ledger.get("host") or ""
        return self._host_id

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from building or removing slots of this host meanwhile."""
        busy = NetslotError("another netslot is building or removing slots of this host", hint="wait for it to end")
        with self._locked("lock", busy):
            yield

    @contextlib.contextmanager
    def _locked(self, name: str, taken: NetslotError) -> Iterator[None]:
        """Hold a lock file of the state directory, which goes with the process (flock(2)), or raise ``taken``."""
        fd = self._open_lock(name)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise taken from error
            yield
        finally:
            os.close(fd)

    def _open_lock(self, name: str) -> int:
        path = self.state_dir / name
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NetslotError(f"cannot open {path}: {error.strerror}") from error

    @contextlib.contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Keep all others, threads and processes, from changing slot ``number`` in the kernel meanwhile.

        One byte of a file for each slot; the lock goes with the process (fcntl(2), open file description locks).
        Only for the worker thread, which holds one at a time.
        """
        if self._slot_locks < 0:
            self._slot_locks = self._open_lock("slots.lock")
        fcntl.fcntl(self._slot_locks, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
        try:
            yield
        finally:
            fcntl.fcntl(self._slot_locks, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, number, 1, 0))

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Be the host's one daemon meanwhile, or at least keep any from starting. RefusedError when one runs."""
        running = RefusedError("the daemon of this host is running", hint="stop it first (systemctl stop netslot)")
        with self._locked("daemon.lock", running):
            yield

    # --- the spec ------------------------------------------------------------------------------------

    @property
    def spec(self) -> HostSpec:
        """The spec as it was when ``up`` last ran, whatever became of the files since."""
        digest = self.ledger.get("spec_digest")
        if not digest:
            raise RefusedError(f"no spec is known in {self.state_dir}", hint="netslot up SPEC")
        with self._lock:
            if self._spec is None or digest != self._spec_digest:
                saved = json.loads(self.ledger.get("spec") or "")
                path = Path(saved["file"])
                self._spec = parse(
                    saved["text"], path, slots=saved["slots"], files=saved["files"], numbers=saved.get("numbers")
                )
                self._spec_digest = digest
                self._templates.clear()
            return self._spec

    def keep_spec(self, spec: HostSpec, slots: int | None) -> None:
        """Make ``spec`` the host's. Tenants of its roster keep the slots that they have here."""
        files = [*spec.root.rules.files, *spec.root.published, *([spec.roster] if spec.roster is not None else [])]
        for each in spec.classes.values():
            files += each.rules.files if each.rules is not None else ()
        source = {
            "file": str(spec.file),
            "text": spec.file.read_text(encoding="utf-8"),
            "slots": slots,
            "files": {file.name: file.text for file in files},
            "numbers": self._numbers(spec),
        }
        text = json.dumps(source)
        self.ledger.put(spec=text, spec_digest=hashlib.sha256(text.encode()).hexdigest())

    def _numbers(self, spec: HostSpec) -> dict[str, int]:
        """The slots of the roster's tenants: the ones that they had, or else numbers that are free."""
        built = {record.slot for record in self.ledger.slots()}
        before: dict[str, int] = json.loads(self.ledger.get("spec") or "{}").get("numbers", {})
        # Whoever left the roster while the slot was in use finds it again on coming back.
        kept = {name: number for name, number in before.items() if number in built and name not in spec.by_tenant}
        names = sorted(spec.by_tenant, key=lambda name: spec.by_tenant[name][0])
        return kept | numbered(names, before, built | set(kept.values()))

    @property
    def slots_override(self) -> int | None:
        """The number of slots that ``up`` was given in place of the spec's."""
        slots: int | None = json.loads(self.ledger.get("spec") or "{}").get("slots")
        return slots

    def class_spec(self, name: str) -> ClassSpec:
        """UsageError when the spec has no such class (any more)."""
        spec = self.spec
        if name not in spec.classes:
            known = ", ".join(spec.classes)
            raise UsageError(f"the host has no class {name!r}", hint=f"its classes: {known}")
        return spec.classes[name]

    def plan(self, number: int, class_name: str) -> SlotPlan:
        """UsageError when the spec has no such class, or its roster nobody with such a slot (any more)."""
        spec, of = self.spec, self.class_spec(class_name)
        if not spec.has(number, class_name):
            hint = "release it; netslot up removes it then"
            raise UsageError(f"the roster has nobody any more whose slot is {number}", hint=hint)
        return SlotPlan(spec, of, number, self.host_id)

    def template(self, class_name: str) -> Template:
        """The class's dies; cast when first asked for."""
        spec = self.spec
        with self._lock:
            if class_name not in self._templates:
                self._templates[class_name] = templates.cast(spec, spec.classes[class_name], self.host_id)
            return self._templates[class_name]

    # --- the kernel ----------------------------------------------------------------------------------

    @property
    def worker(self) -> netns.Worker:
        """The thread whose home is the host's root namespace."""
        with self._lock:
            if self._worker is None:
                name = self.root_netns
                if name is None and self.exists:
                    name = self.ledger.get("root_netns") or None
                if name is None:
                    self._worker = netns.Worker()
                else:
                    fd = netns.open_named(name)
                    try:
                        self._worker = netns.Worker(fd)
                    finally:
                        os.close(fd)
            return self._worker

    def run(self, work: Callable[[Workshop], T]) -> T:
        """Do ``work`` in the root namespace, on the worker thread, alone."""
        return self.worker.run(self._with_workshop, work)

    def _with_workshop(self, work: Callable[[Workshop], T]) -> T:
        if self._workshop is None:
            self._workshop = Workshop()
        return work(self._workshop)

    @property
    def root_snapshot(self) -> Snapshot | None:
        text = self.ledger.get("root")
        return Snapshot.parse(text) if text else None

    def pins(self) -> dict[int, str]:
        """The slots that are in the kernel: number and name of every pin that looks like one of this host's."""
        prefix = self.spec.prefix
        found = {}
        for name in netns.names():
            digits = name.removeprefix(prefix)
            if name.startswith(prefix) and digits.isdecimal() and not digits.startswith("0"):
                found[int(digits)] = name
        return found


def read_tag(name: str) -> tuple[str, int, str, str] | None:
    """(host id, number, class, digest) that the slot pinned as ``name`` carries. Runs on a worker thread."""
    try:
        fd = netns.open_named(name)
    except KernelError:
        return None
    try:
        with netns.entered(fd), Socket() as sock:
            loopback = [rt.parse_link(message) for message in sock.execute([rt.get_link(1)])]
    finally:
        os.close(fd)
    return parse_tag(loopback[0].alias) if loopback else None


def _boot() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()
