"""What a process tries that ``netslot exec --as-tenant`` started: everything but sending packets.

Each way must fail for the tenant, and work without what is said to stop it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

import attack_lab
import hostlab
from attack_lab import HOSTILE, KINDS, VICTIM, Scene
from attack_process import Way, Without, ways
from netslot.errors import HostError
from netslot.host import execution

PROCESSES = [kind for kind in KINDS if kind.attachment == "process"]


@pytest.fixture(scope="module", params=PROCESSES, ids=str)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with attack_lab.scene(request.param, tmp_path_factory.mktemp("process") / "host") as each:
        try:
            each.host.execute(HOSTILE, ["true"], as_tenant=True)
        except HostError as error:
            pytest.skip(f"tenants cannot have users of their own: {error}")
        yield each


@contextmanager
def asleep(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """Its number, for as long as it is there."""
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def of(scene: Scene) -> list[Way]:
    """The rules are each kind of host's own; the rest has nothing to do with what loads them."""
    return [
        way for way in ways() if way.backend == scene.of.backend or (not way.backend and scene.of == PROCESSES[0])
    ]


def test_a_tenant_neither_changes_its_slot_nor_leaves_it(scene: Scene) -> None:
    own, others = (execution.tenant_user(plan) for plan in (scene.plan, scene.victim))
    assert own != others
    wrong = []
    with ExitStack() as held:
        of_root = held.enter_context(asleep(subprocess.Popen(["sleep", "60"])))
        of_tenant = held.enter_context(asleep(scene.host.start(VICTIM, ["sleep", "60"], as_tenant=True)))
        names = {"root": scene.root.path, "neighbour": scene.neighbour.path, "root_pid": of_root}
        names |= {
            "tenant_pid": of_tenant,
            "root4": scene.values["root_address"],
            "root6": scene.values["root_address6"],
        }

        def works(command: str, tenant: int | None = own) -> bool:
            for name, value in names.items():
                command = command.replace(f"{{{name}}}", str(value))
            shell = ["sh", "-c", f"{{ {command}; }} >/dev/null 2>&1"]
            user = (tenant, tenant) if tenant is not None else None
            return scene.host.execute(HOSTILE, shell, as_tenant=tenant is not None, user=user) == 0

        for way in of(scene):
            if works(way.command):
                wrong.append(f"{way}: not stopped")
            elif way.without is Without.TWIN and (works(way.command, None) or not works(way.twin)):
                wrong.append(f"{way}: not because of whose namespace it is")
            elif way.without is not Without.TWIN:
                user = {Without.CAPABILITIES: None, Without.USER: 0, Without.OWN_USER: others}[way.without]
                if not works(way.command, user):
                    wrong.append(f"{way}: fails also without what is said to stop it")
                scene.mend()
    assert not wrong, "\n".join(wrong)
    assert scene.host.verify().drift == []


@pytest.mark.parametrize("scene", PROCESSES[:1], indirect=True, ids=str)
def test_a_tenant_is_started_without_capabilities_and_cannot_get_any(scene: Scene) -> None:
    shell = "grep -E '^(Cap|NoNewPrivs|Groups)' /proc/self/status | tr -d '\\t\\n ' | tee /dev/stderr"
    nothing = "0" * 16
    wanted = (
        "Groups:" + "".join(f"Cap{name}:{nothing}" for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")) + "NoNewPrivs:1"
    )
    for user in (None, (0, 0)):
        command = ["sh", "-c", f'test "$({shell})" = "{wanted}"']
        assert scene.host.execute(HOSTILE, command, as_tenant=True, user=user) == 0


@pytest.mark.parametrize("scene", PROCESSES[:1], indirect=True, ids=str)
def test_the_command_line_does_the_same(scene: Scene) -> None:
    place = ["--state-dir", str(scene.host.engine.state_dir), "--root-netns", scene.root.name]

    def netslot(*arguments: str) -> tuple[int, str]:
        command = [hostlab.NETSLOT, *place, "exec", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.strip()

    own, number = execution.tenant_user(scene.plan), str(HOSTILE)
    assert netslot("--as-tenant", number, "--", "id", "-u") == (0, str(own))
    assert netslot("--as-tenant", "--user", "1234:99", number, "--", "id", "-g") == (0, "99")
    assert netslot(number, "--", "id", "-u") == (0, "0")
    route = ["ip", "route", "add", "blackhole", "192.0.2.0/24"]
    assert netslot("--as-tenant", "--user", "0", number, "--", *route)[0] == 2  # ip's own status
    for wrong in (["--user", "1234"], ["--as-tenant", "--user", "root"]):
        assert netslot(*wrong, number, "--", "true")[0] == 2
