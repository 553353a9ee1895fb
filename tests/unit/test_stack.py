"""LocalStack with tiny HTTP servers in place of the services."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tercet.stack import SERVICES, LocalStack, Ports, StackError, read_state
from tercet.supervision import Event

STUB = """
import http.server, os, sys
name = sys.argv[1]
print("environment", sorted(v for v in os.environ if v.startswith(name.upper())), flush=True)
if os.environ.get("REFUSE") == name:
    sys.exit("the model cannot be loaded")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *args): pass
host, port = os.environ[f"{name.upper()}_LISTEN_HOST"], int(os.environ[f"{name.upper()}_LISTEN_PORT"])
http.server.ThreadingHTTPServer((host, port), Handler).serve_forever()
"""
FREE = Ports(0, 0, 0)


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    return {name: [sys.executable, str(script), name] for name in SERVICES}


class Events(list[Event]):
    """Collects events and lets a test wait for one."""

    async def wait_for(self, kind: str, service: str, count: int = 1) -> Event:
        async with asyncio.timeout(20):
            while True:
                found = [event for event in self if (event.kind, event.service) == (kind, service)]
                if len(found) >= count:
                    return found[count - 1]
                await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A zombie that nobody has waited for yet is not alive.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc").exists()


async def test_starts_all_and_leaves_nothing_behind(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """While it runs the state file says where; afterwards no process and no state file is left."""
    data_dir = tmp_path / "data"
    events = Events()
    async with LocalStack(data_dir, environ=os.environ, ports=FREE, commands=commands, on_event=events.append) as stack:
        state = read_state(data_dir)
        assert state is not None
        assert state.pid == os.getpid()
        assert state.urls == stack.urls
        assert len(set(stack.urls.values())) == 3
        pids = [pid for pid in state.pids.values() if pid is not None]
        assert len(pids) == 3
        assert all(map(is_alive, pids))
    assert not any(map(is_alive, pids))
    assert read_state(data_dir) is None
    assert {event.service for event in events if event.kind == "ready"} == set(SERVICES)
    assert "SEARCH_EMBEDDING_URL" in (data_dir / "logs" / "search.log").read_text()


async def test_a_key_is_for_all_three(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """Each asks for it, and search sends it to the others; a variable of the user's own comes first."""
    stack = LocalStack(
        tmp_path, environ={**os.environ, "RERANK_API_KEY": "own"}, ports=FREE, commands=commands, api_key="k"
    )
    async with stack:
        environ = {name: stack._services[name].spec.environ for name in SERVICES}
    keys = [environ[name][f"{name.upper()}_API_KEY"] for name in SERVICES]
    assert keys == ["k", "own", "k"]
    assert environ["search"]["SEARCH_PEER_API_KEY"] == "k"


async def test_crashed_service_is_restarted_and_said_so(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """A killed service comes back on its port with a growing back-off; the others are not touched."""
    events = Events()
    async with LocalStack(
        tmp_path, environ=os.environ, ports=FREE, commands=commands, on_event=events.append, first_backoff_s=0.1
    ):
        before = read_state(tmp_path)
        assert before is not None
        for attempt in (1, 2):
            state = read_state(tmp_path)
            assert state is not None
            pid = state.pids["rerank"]
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            exited = await events.wait_for("exited", "rerank", attempt)
            assert exited.status == -signal.SIGKILL
            assert exited.restart_in_s == pytest.approx(0.1 * 2 ** (attempt - 1))
            await events.wait_for("ready", "rerank", attempt + 1)
        after = read_state(tmp_path)
        assert after is not None
        assert after.urls == before.urls
        assert after.pids["search"] == before.pids["search"]
        assert after.pids["rerank"] != before.pids["rerank"]


async def test_taken_port_is_named_with_its_flag(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """Nothing is started when a port is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stack = LocalStack(tmp_path, environ=os.environ, ports=Ports(0, 0, rerank=port), commands=commands)
        with pytest.raises(StackError, match=rf"port {port} .*in use.*--rerank-port"):
            await stack.start()
    assert not (tmp_path / "logs" / "search.log").exists()
    async with LocalStack(tmp_path, environ=os.environ, ports=FREE, commands=commands):
        pass  # the failed start gave the lock back


async def test_second_stack_on_a_data_dir_is_refused(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """Two search services must not write one ledger; the refusal names the process, and leaves the first one be."""
    async with LocalStack(tmp_path, environ=os.environ, ports=FREE, commands=commands):
        with pytest.raises(StackError, match=rf"process {os.getpid()}\)"):
            await LocalStack(tmp_path, environ=os.environ, ports=FREE, commands=commands).start()
        assert read_state(tmp_path) is not None


async def test_failing_start_tells_why_and_stops_the_rest(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """The error holds the end of the log, and no service is left running."""
    environ = {**os.environ, "REFUSE": "embedding"}
    events = Events()
    stack = LocalStack(tmp_path, environ=environ, ports=FREE, commands=commands, on_event=events.append)
    with pytest.raises(StackError, match=r"embedding .*exit status 1[\s\S]*the model cannot be loaded"):
        await stack.start()
    assert stack.urls
    assert all(service.pid is None for service in stack._services.values())


def test_children_end_with_a_killed_parent(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """kill -9 of the supervisor leaves no service holding the ports and the ledger."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells children of their parent's death")
    script = f"""
import asyncio, os, pathlib
from tercet.stack import LocalStack, Ports
async def main():
    async with LocalStack(pathlib.Path({str(tmp_path)!r}), environ=os.environ, ports=Ports(0, 0, 0), commands={commands!r}):
        print("up", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        pids = [service["pid"] for service in json.loads((tmp_path / "stack.json").read_text())["services"].values()]
        parent.kill()
    until = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))
    assert read_state(tmp_path) is None, "the state of a dead stack does not count"


async def test_stop_kills_what_ignores_sigterm(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """After the grace a service that does not end is killed."""
    script = tmp_path / "stubborn.py"
    script.write_text("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STUB)
    commands["search"][1] = str(script)
    stack = LocalStack(tmp_path, environ=os.environ, ports=FREE, commands=commands, grace_s=0.3)
    await stack.start()
    state = read_state(tmp_path)
    assert state is not None
    pid = state.pids["search"]
    assert pid is not None
    await stack.stop()
    assert not is_alive(pid)


def test_log_over_its_limit_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a start a big log becomes `.1`, replacing the one before."""
    from tercet import supervision

    monkeypatch.setattr(supervision, "MAX_LOG_BYTES", 10)
    log = tmp_path / "search.log"
    log.write_text("x" * 11)
    supervision._rotate(log)
    assert not log.exists()
    assert (tmp_path / "search.log.1").read_text() == "x" * 11
