"""The real broker and the real Kafka, started, used, killed and stopped."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer
from typer.testing import CliRunner

from schemas.codec import encode
from schemas.errors import ConfigError
from schemas.topics import ALARMS, COMMANDS
from settings import load
from stack.__main__ import app
from stack.native import NativeStack
from stack.processes import MARK, StartFailed
from stack.settings import StackSettings, remember
from tests.brokers import Brokers, kill
from tests.eventually import eventually
from tests.wire import small_tape

BROKERS = ["nats", "kafka"]
PORTS = ("mqtt_port", "nats_port", "nats_monitor_port", "kafka_port", "kafka_controller_port")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def left_of(home: Path) -> list[psutil.Process]:
    marked = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK, "").endswith(f"@{home}") and process.status() != psutil.STATUS_ZOMBIE:
                marked.append(process)
    return marked


def open_ports(settings: StackSettings) -> list[str]:
    opened = []
    for name in PORTS:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", getattr(settings, name)), timeout=1).close()
            opened.append(name)
    return opened


def fresh_stack(home: Path) -> NativeStack:
    return NativeStack(load(StackSettings, home=home, **dict(zip(PORTS, free_ports(len(PORTS)), strict=True))))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeStack]:
    stack = fresh_stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.start(BROKERS)
        yield stack
    finally:
        stack.stop()
    assert left_of(stack.home) == []
    assert open_ports(stack.settings) == []


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[NativeStack]:
    stack = fresh_stack(tmp_path)
    try:
        yield stack
    finally:
        stack.stop()
    assert left_of(tmp_path) == []
    assert open_ports(stack.settings) == []


def command(stack: NativeStack, *arguments: str) -> subprocess.Popen[str]:
    ports = {f"METERSTREAM_{name.upper()}": str(getattr(stack.settings, name)) for name in PORTS}
    return subprocess.Popen(
        [sys.executable, "-m", "stack", *arguments],
        env={**os.environ, **ports, "METERSTREAM_HOME": str(stack.home), "MODE": "native"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class TestNativeBrokers(Brokers):
    @pytest.fixture
    def killed_and_started(self, stack: NativeStack) -> Callable[[str], None]:
        def kill_and_start(name: str) -> None:
            kill(stack, name)
            eventually(lambda: not stack.is_running(name))
            assert stack.start([name]) == [name]

        return kill_and_start


def test_starting_again_starts_nothing_and_keeps_the_processes(stack: NativeStack) -> None:
    before = [stack.pid(name) for name in BROKERS]
    assert stack.start(BROKERS) == []
    assert [stack.pid(name) for name in BROKERS] == before


def test_another_process_sees_the_same_stack(stack: NativeStack) -> None:
    other = NativeStack(stack.settings)
    assert [state.state for state in other.states()][:2] == ["running", "running"]
    assert [other.pid(name) for name in BROKERS] == [stack.pid(name) for name in BROKERS]


def test_a_second_stack_on_the_same_ports_is_refused_by_the_variables_names(stack: NativeStack, tmp_path: Path) -> None:
    second = NativeStack(stack.settings.model_copy(update={"home": tmp_path}))
    theirs = f"kafka of the stack in {stack.home}"
    with pytest.raises(ConfigError, match=rf"METERSTREAM_MQTT_PORT.*{theirs}.*METERSTREAM_KAFKA_PORT"):
        second.start(BROKERS)
    assert left_of(tmp_path) == []


def test_alarms_that_stand_are_shown_and_acknowledged_by_the_beginning_of_their_ids(
    stack: NativeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = datetime(2024, 6, 10, 8, tzinfo=UTC)
    life: dict[str, Any] = {"alarm_type": "tamper", "severity": "error", "repeat_count": 0, "source": "meter_event"}
    life["updated_at"] = at
    stands, over = {"alarm_id": "0f3c", "meter_id": "m1"} | life, {"alarm_id": "77aa", "meter_id": "m2"} | life
    producer = Producer({"bootstrap.servers": stack.settings.kafka_bootstrap})
    for alarm, ended in [(stands, None), (over, None), (stands | {"repeat_count": 1}, None), (over, at)]:
        change = alarm | {"state": "cleared" if ended else "active", "raised_at": at, "cleared_at": ended}
        producer.produce(ALARMS.name, encode("alarm", change), alarm["meter_id"])
    producer.produce(COMMANDS.name, b"no acknowledgement", "m1")
    assert producer.flush(30) == 0
    monkeypatch.setenv("METERSTREAM_KAFKA_PORT", str(stack.settings.kafka_port))

    def said(*arguments: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, arguments)
        return found.exit_code, found.output

    code, shown = said("alarms")
    assert code == 0 and re.search(r"0f3c  2024-06-10 08:00:00  m1 +active  error   tamper\n", shown)
    assert "77aa" not in shown and shown.splitlines()[-1].startswith("1 that stand in topic alarms-v1")
    lines = said("alarms", "--all", "--json")[1].splitlines()
    assert sorted(json.loads(line)["alarm_id"] for line in lines) == ["0f3c", "77aa"]
    assert "0 in topic" in said("alarms", "--all", "--meter", "m3")[1]
    assert said("acknowledge", "0f", "--by", "control room") == (
        0, "Acknowledged: alarm 0f3c of m1, by control room.\n"
    )  # fmt: skip
    said("acknowledge", "0f3c", "--meter", "m1", "--by", "somebody later")
    assert re.search(r"0f3c .* tamper, seen by control room\n", said("alarms")[1])
    code, shown = said("acknowledge", "ff")
    assert code == 2 and "no alarms begin with 'ff' in topic alarms-v1, which has 7 days of them" in shown
    code, shown = said("acknowledge", "")
    assert code == 2 and "2 alarms begin with" in shown


def test_a_killed_broker_is_dead_until_it_is_started(stack: NativeStack) -> None:
    kill(stack, "nats")
    eventually(lambda: stack.dead(BROKERS) == ["nats"])
    assert stack.start(BROKERS) == ["nats"]
    stack.restart("nats")
    assert stack.dead(BROKERS) == []


def test_a_process_that_dies_while_starting_shows_its_log_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken-server"
    broken.write_text("#!/bin/sh\nsleep 100 &\necho no luck today; exit 3\n")
    broken.chmod(0o755)
    stack = fresh_stack(tmp_path)
    stack = NativeStack(stack.settings.model_copy(update={"nats_server": broken}))
    with pytest.raises(StartFailed, match=r"(?s)nats died while starting.*no luck today"):
        stack.start(BROKERS)
    assert left_of(tmp_path) == []


def test_ctrl_c_while_starting_leaves_nothing(own_stack: NativeStack) -> None:
    process = command(own_stack, "up", *BROKERS)
    eventually(lambda: own_stack.is_running("kafka"), 20)
    process.send_signal(signal.SIGINT)
    assert process.wait(150) == 130, process.communicate()
    assert left_of(own_stack.home) == []


def test_up_leaves_a_supervisor_that_brings_back_what_was_killed(own_stack: NativeStack) -> None:
    up = command(own_stack, "up", "nats")
    assert up.wait(150) == 0, up.communicate()
    killed = kill(own_stack, "nats")
    eventually(lambda: own_stack.pid("nats") not in {None, killed}, 15)
    up = command(own_stack, "up", "kafka")  # and what is started later it looks after too
    assert up.wait(450) == 0, up.communicate()
    both = {kill(own_stack, name) for name in BROKERS}
    eventually(lambda: not {own_stack.pid(name) for name in BROKERS} & {None, *both}, 60)


def test_down_works_without_the_supervisor_and_says_so_when_nothing_runs(own_stack: NativeStack) -> None:
    up = command(own_stack, "up", "nats")
    assert up.wait(150) == 0, up.communicate()
    kill(own_stack, "supervisor")
    down = command(own_stack, "down")
    assert "nats stopped" in down.communicate(timeout=150)[0]
    assert left_of(own_stack.home) == []
    assert open_ports(own_stack.settings) == []
    again = command(own_stack, "down")
    assert "nothing was running." in again.communicate(timeout=150)[0]
    assert again.returncode == 0


def elsewhere(stack: NativeStack, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """A command in another shell, which knows the home and nothing else of the stack."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("METERSTREAM_")}
    done = subprocess.run(
        [sys.executable, "-m", "stack", *arguments],
        env={**known, "METERSTREAM_HOME": str(stack.home), **variables},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_another_shell_that_knows_the_home_alone_finds_the_stack_and_its_ports(own_stack: NativeStack) -> None:
    up = command(own_stack, "up", "nats")
    assert up.wait(150) == 0, up.communicate()
    _, out, _ = elsewhere(own_stack, "status", "--json")
    nats = next(part for part in json.loads(out)["processes"] if part["name"] == "nats")
    assert (nats["state"], nats["port"]) == ("running", own_stack.settings.mqtt_port)
    _, out, _ = elsewhere(own_stack, "down", MODE="auto")
    assert "nats stopped" in out
    started = json.loads((own_stack.home / "run" / "started.json").read_text())
    assert (started["mode"], started["mqtt_port"]) == ("native", own_stack.settings.mqtt_port)


def test_settings_that_contradict_what_runs_are_said_and_refused_where_they_would_act(own_stack: NativeStack) -> None:
    up = command(own_stack, "up", "nats")
    assert up.wait(150) == 0, up.communicate()
    message = f"METERSTREAM_MQTT_PORT is 1, and the stack in {own_stack.home} was started with "
    code, _, err = elsewhere(own_stack, "up", "nats", METERSTREAM_MQTT_PORT="1")
    assert code == 2 and message in err and "make down first" in err
    code, out, err = elsewhere(own_stack, "status", "--json", METERSTREAM_MQTT_PORT="1")
    assert message in err
    assert json.loads(out)["processes"][0]["port"] == own_stack.settings.mqtt_port
    code, _, err = elsewhere(own_stack, "up", "nats", MODE="docker")
    assert code == 2 and "MODE is docker, and the stack in" in err


def test_a_replay_goes_to_the_stack_of_the_home(own_stack: NativeStack, tmp_path: Path) -> None:
    own_stack.start(["nats"])
    small_tape.write(tmp_path / "tape")
    known = {name: value for name, value in os.environ.items() if not name.startswith("METERSTREAM_")}
    replay = subprocess.run(
        [sys.executable, "-m", "replay", "run", "--tape", str(tmp_path / "tape"), "--speed", "max", "--json"],
        env={**known, "METERSTREAM_HOME": str(own_stack.home)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert json.loads(replay.stdout)["is_whole"], replay.stderr


def test_the_lake_of_the_home_answers_sql(tmp_path: Path) -> None:
    stack = fresh_stack(tmp_path)
    remember(stack.settings, "native", cluster=False, critical=False)  # where an engine answers, a new home is Docker's
    code, out, _ = elsewhere(stack, "sql", "--json", "SELECT count(*) AS n FROM readings")
    assert (code, out) == (0, '{"n": 0}\n')
    code, _, err = elsewhere(stack, "sql", "SELECT * FROM nothing")
    assert code == 2 and "nothing" in err
