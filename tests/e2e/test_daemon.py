"""The daemon over its socket: leases, whose they are, how they end, and what it does by itself."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemonlab import Daemon, eventually, serving
from hostlab import PlayedHost, played
from netslot.errors import NetslotError, RefusedError, UsageError
from netslot.kernel import netns
from netslot.serve.client import Client, connect, socket_path
from netslot.serve.wire import OPERATIONS

NOBODY = 65534


@pytest.fixture(scope="module")
def shared(private_run: None) -> Iterator[Daemon]:
    """One daemon for the tests that leave all slots free."""
    with played(slots=4) as lab:
        with lab.host() as host:
            host.up(lab.spec)
        os.chmod(lab.spec.parent, 0o755)
        with serving(lab, "--verify-seconds", "0", "--group", "nogroup") as daemon:
            yield daemon


@pytest.fixture
def client(shared: Daemon) -> Iterator[Client]:
    with shared.client() as client:
        yield client
        for lease in client.request("GET", "/v1/leases")["leases"]:
            client.release(lease["lease"])
        eventually(lambda: states(client) == {"free": 4})


def states(client: Client) -> dict[str, int]:
    found: dict[str, int] = {}
    for slot in client.request("GET", "/v1/slots")["slots"]:
        found[slot["state"]] = found.get(slot["state"], 0) + 1
    return found


def as_nobody(lab: PlayedHost, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """A request by another user, in a process of that user's."""
    program = """
import json, os, sys
from pathlib import Path
from netslot.serve.client import Client
os.setgroups([]); os.setgid(65534); os.setuid(65534)
client = Client(Path(sys.argv[1]))
client._connection.request(sys.argv[2], sys.argv[3], sys.argv[4])
answer = client._connection.getresponse()
print(json.dumps([answer.status, json.loads(answer.read())]))
"""
    command = [sys.executable, "-c", program, str(socket_path(lab.state_dir)), method, path, json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, answer = json.loads(done.stdout)
    return status, answer


def test_acquire_is_idempotent_and_release_cleans(client: Client) -> None:
    lease = client.acquire("vm-1", params={"allow": ["192.0.2.0/24"]})
    assert client.acquire("vm-1")["lease"] == lease["lease"]
    assert lease["params"] == {"allow": ["192.0.2.0/24"]}
    assert client.release(lease["lease"]) == {"slot": lease["slot"], "released": True}
    with pytest.raises(RefusedError):
        client.release(lease["lease"])
    eventually(lambda: states(client) == {"free": 4})


def test_parameters_are_in_force_when_the_answer_comes(client: Client) -> None:
    lease = client.acquire("vm-1", params={"allow": ["192.0.2.0/24"]})
    listed = ["nsenter", f"--net={lease['netns_path']}", "nft", "list", "set", "inet", "slot", "allow"]
    assert "192.0.2.0/24" in subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    changed = client.update(lease["lease"], {"allow": ["198.51.100.0/24"]})
    assert changed["params"] == {"allow": ["198.51.100.0/24"]}
    assert "198.51.100.0/24" in subprocess.run(listed, capture_output=True, text=True, check=True).stdout


def test_wrong_requests_are_refused_in_words(client: Client) -> None:
    for body in ({"owner": ""}, {"owner": "a", "class": "none"}, {"owner": "a", "params": {"x": 1}}, {"oner": "a"}):
        with pytest.raises(UsageError):
            client.request("POST", "/v1/leases", body)
    with pytest.raises(NetslotError):
        client.request("GET", "/v2")
    assert client.request("GET", "/healthz")["ok"]


def test_those_who_wait_are_served_in_order(client: Client, shared: Daemon) -> None:
    held = [client.acquire(f"vm-{number}")["lease"] for number in range(4)]
    with pytest.raises(RefusedError):
        client.acquire("too many")

    def wait(number: int) -> str:
        with shared.client() as own:
            return str(own.acquire(f"waiter-{number}", wait=20)["acquired_at"])

    with ThreadPoolExecutor(3) as pool:
        waiting = []
        for number in range(3):
            waiting.append(pool.submit(wait, number))
            time.sleep(0.2)
        for lease in held[:3]:
            client.release(lease)
        # When each was served, by the daemon's clock: answers may overtake each other on their way.
        served = [each.result() for each in waiting]
    assert served == sorted(served)
    assert len(set(served)) == 3


def test_who_stops_waiting_is_given_nothing(client: Client, shared: Daemon) -> None:
    held = [client.acquire(f"vm-{number}")["lease"] for number in range(4)]
    with socket.socket(socket.AF_UNIX) as gone:
        gone.connect(str(socket_path(shared.host.state_dir)))
        body = json.dumps({"owner": "gone", "wait": 20}).encode()
        gone.send(b"POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(0.3)
    client.release(held[0])
    assert client.acquire("here", wait=10)["owner"] == "here"
    assert client.find(owner="gone") is None


def test_leases_end_with_their_time_or_their_holder(client: Client) -> None:
    holder = subprocess.Popen(["sleep", "100"])
    try:
        client.acquire("timed", ttl=0.3)
        kept = client.acquire("renewed", ttl=0.3)["lease"]
        client.update(kept, ttl=60)
        client.acquire("held", holder_pid=holder.pid)
        eventually(lambda: client.find(owner="timed") is None)
        assert client.find(owner="held") is not None
        assert client.find(owner="renewed") is not None
    finally:
        holder.kill()
        holder.wait()
    eventually(lambda: client.find(owner="held") is None)


def test_another_user_may_acquire_but_touch_only_its_own(client: Client, shared: Daemon) -> None:
    lab = shared.host
    mine = client.acquire("roots")
    status, theirs = as_nobody(lab, "POST", "/v1/leases", {"owner": "nobodys"})
    assert status == 201
    assert as_nobody(lab, "DELETE", f"/v1/leases/{mine['lease']}")[0] == 403
    assert as_nobody(lab, "GET", f"/v1/leases/{mine['lease']}")[0] == 403
    assert as_nobody(lab, "POST", "/v1/leases", {"owner": "roots"})[0] == 409
    assert as_nobody(lab, "POST", "/v1/leases", {"owner": "x", "holder_pid": os.getpid()})[0] == 403
    assert as_nobody(lab, "POST", "/v1/verify", {})[0] == 403
    assert as_nobody(lab, "DELETE", f"/v1/slots/{mine['slot']}")[0] == 403
    assert [each["owner"] for each in as_nobody(lab, "GET", "/v1/leases")[1]["leases"]] == ["nobodys"]
    listed = as_nobody(lab, "GET", "/v1/slots")[1]["slots"]
    assert {each.get("owner") for each in listed} == {None, "nobodys"}
    assert as_nobody(lab, "DELETE", f"/v1/leases/{theirs['lease']}") == (
        200,
        {"slot": theirs["slot"], "released": True},
    )


def test_who_may_not_open_the_socket_may_do_nothing(shared: Daemon) -> None:
    path = socket_path(shared.host.state_dir)
    assert path.stat().st_mode & 0o777 == 0o660
    assert path.stat().st_uid == 0


def test_answers_are_what_the_description_says(client: Client) -> None:
    description = client.request("GET", "/openapi.json")
    assert description["openapi"].startswith("3.1")
    lease = client.acquire("vm-1")["lease"]
    bodies: dict[str, Any] = {"acquire": {"owner": "vm-2"}, "update": {"ttl": 60}, "renew": {"ttl": 60}, "verify": {}}
    seen = set()
    for each in sorted(OPERATIONS, key=lambda each: each.method == "DELETE"):
        path = re.sub("{lease}", lease, each.path).replace("{slot}", "1")
        connection = client._connection
        connection.request(each.method, path, json.dumps(bodies[each.name]) if each.body else None)
        response = connection.getresponse()
        content = response.read()
        described = description["paths"][each.path][each.method.lower()]["responses"]
        assert str(response.status) in described, (each.name, response.status)
        kind = each.answers[response.status]
        if kind is not None and kind is not dict:
            value = msgspec.json.decode(content, type=kind)
            assert json.loads(msgspec.json.encode(value)) == json.loads(content), each.name
        seen.add(each.name)
    assert seen == {operation["operationId"] for path in description["paths"].values() for operation in path.values()}


def test_metrics_count_what_happens(client: Client) -> None:
    def figure(name: str, query: str = "") -> float:
        connection = client._connection
        connection.request("GET", f"/metrics{query}")
        text = connection.getresponse().read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])

    before = figure("netslot_acquire_seconds_count")
    slot = client.acquire("vm-1")["slot"]
    assert figure("netslot_acquire_seconds_count") == before + 1
    assert figure('netslot_slots{class="default",state="leased"}') == 1
    assert figure("netslot_root_rules") > 0
    name = f'netslot_slot_packets_total{{slot="{slot}",link="up0",direction="receive"}}'
    assert figure(name, f"?slot={slot}") >= 0


def test_the_command_line_asks_the_daemon(client: Client, shared: Daemon) -> None:
    lab = shared.host
    lease = lab.json("acquire", "--owner", "cli", "--param", "allow=192.0.2.0/24")
    assert client.find(owner="cli") is not None
    assert lab.json("update", "--owner", "cli", "--param", "allow=198.51.100.0/24")["lease"] == lease["lease"]
    assert lab.json("release", "--owner", "cli") == {"slot": lease["slot"], "released": True}
    assert lab.netslot("release", "--owner", "cli", check=False).returncode == 3
    assert lab.netslot("down", check=False).returncode == 3
    assert lab.netslot("serve", check=False).returncode == 3


def test_it_builds_between_watermarks_and_reloads() -> None:
    with played(slots=6) as lab, serving(lab, str(lab.spec), "--low", "2", "--high", "3") as daemon:  # noqa: SIM117
        with daemon.client() as client:
            eventually(lambda: states(client) == {"free": 3})
            held = client.acquire("a")
            client.acquire("b")
            eventually(lambda: states(client) == {"leased": 2, "free": 3})
            rules = lab.spec.with_name("slot.nft")
            rules.write_text(rules.read_text(encoding="utf-8").replace("dport 25 drop", "dport 26 drop"))
            daemon.reload()
            listing = ["nft", "list", "chain", "inet", "slot", "forward"]

            def rules_of(slot: int) -> str:
                command = ["nsenter", f"--net={netns.NETNS_DIR}/{lab.prefix}{slot}", *listing]
                return subprocess.run(command, capture_output=True, text=True, check=False).stdout

            free = next(each["slot"] for each in client.request("GET", "/v1/slots?state=free")["slots"])
            eventually(lambda: "dport 26" in rules_of(free))
            assert "dport 25" in rules_of(held["slot"])
            client.release(held["lease"])
            eventually(lambda: "dport 26" in rules_of(held["slot"]))


def test_a_spec_that_a_tool_refuses_leaves_the_daemon_as_it_was() -> None:
    with played(slots=2) as lab, serving(lab, str(lab.spec)) as daemon, daemon.client() as client:
        eventually(lambda: states(client) == {"free": 2})
        rules = lab.spec.with_name("slot.nft")
        before = rules.read_text(encoding="utf-8")
        rules.write_text(before.replace("tcp dport 25", "tcp dprt 25"))
        daemon.reload()
        eventually(lambda: "slot.nft" in daemon.log.read_text(encoding="utf-8"))
        assert client.acquire("a", params={"allow": ["192.0.2.0/24"]})["slot"] == 1
        rules.write_text(before)
        daemon.reload()
        eventually(lambda: client.request("GET", "/healthz")["ok"])


def test_it_repairs_drift_by_itself() -> None:
    with played(slots=2) as lab, serving(lab, str(lab.spec), "--verify-seconds", "5") as daemon:  # noqa: SIM117
        with daemon.client() as client:
            eventually(lambda: states(client) == {"free": 2})
            slot = client.acquire("a", params={"allow": ["192.0.2.0/24"]})
            inside = ["nsenter", f"--net={slot['netns_path']}"]
            subprocess.run([*inside, "nft", "flush", "chain", "inet", "slot", "forward"], check=True)
            listing = [*inside, "nft", "list", "ruleset"]
            eventually(
                lambda: "dport 25" in subprocess.run(listing, capture_output=True, text=True, check=False).stdout
            )


def test_killed_it_comes_back_to_the_same_leases_and_ends_what_is_over() -> None:
    with played(slots=3) as lab, serving(lab, str(lab.spec)) as daemon:
        holder = subprocess.Popen(["sleep", "100"])
        with daemon.client() as client:
            eventually(lambda: states(client) == {"free": 3})
            kept = client.acquire("kept")
            client.acquire("held", holder_pid=holder.pid)
            client.acquire("timed", ttl=0.2)
        daemon.kill()
        holder.kill()
        holder.wait()
        assert connect(lab.state_dir) is None
        with serving(lab) as again, again.client() as client:
            eventually(lambda: states(client) == {"free": 2, "leased": 1})
            assert client.find(owner="kept") == kept
            assert again.stop() == 0
        assert lab.json("verify")["drift"] == []


def test_systemd_hears_that_it_is_ready_and_well(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(20)
        heard: list[str] = []

        def listen() -> None:
            while "STOPPING=1" not in heard:
                heard.append(listener.recv(100).decode())

        thread = threading.Thread(target=listen)
        thread.start()
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with played(slots=1) as lab, serving(lab, str(lab.spec), environment=environment) as daemon:
            eventually(lambda: heard.count("WATCHDOG=1") > 1)
            assert daemon.stop() == 0
        thread.join()
        assert "READY=1" in heard


def test_bodies_that_are_no_http_do_not_stop_it(client: Client, shared: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(socket_path(shared.host.state_dir)))
        sock.send(b"\0\1\2 nonsense\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.")
    raw = http.client.HTTPConnection("localhost")
    raw.sock = socket.socket(socket.AF_UNIX)
    raw.sock.connect(str(socket_path(shared.host.state_dir)))
    raw.request("POST", "/v1/leases", b"{not json")
    assert raw.getresponse().status == 400
    raw.close()
    assert client.request("GET", "/healthz")["ok"]
