"""The stack's settings and what it refuses, without starting anything."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from schemas.errors import ConfigError
from settings import damage, load, started_file
from stack.native import NativeStack
from stack.parts import ALWAYS, KAFKA
from stack.processes import uninterrupted
from stack.settings import ROOT, StackSettings, remember
from tools import setup


def test_ports_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSTREAM_KAFKA_PORT", "19092")
    settings = load(StackSettings)
    assert settings.kafka_bootstrap == "127.0.0.1:19092"
    assert KAFKA.ports(settings)["METERSTREAM_KAFKA_PORT"] == 19092


def test_a_wrong_port_is_a_config_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSTREAM_MQTT_PORT", "70000")
    with pytest.raises(ConfigError, match="METERSTREAM_MQTT_PORT"):
        load(StackSettings)


def test_a_port_wanted_twice_is_refused_before_anything_starts(tmp_path: Path) -> None:
    stack = NativeStack(load(StackSettings, home=tmp_path, mqtt_port=29092, kafka_port=29092))
    with pytest.raises(ConfigError, match=r"29092 is wanted twice.*METERSTREAM_KAFKA_PORT"):
        stack.start(["nats"])
    assert stack.dead() == list(ALWAYS)


def test_a_port_in_use_names_the_port_and_the_variable_that_moves_it(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        stack = NativeStack(load(StackSettings, home=tmp_path, mqtt_port=port))
        with pytest.raises(ConfigError, match=rf"port {port} is in use.*METERSTREAM_MQTT_PORT"):
            stack.start(["nats"])
    assert stack.dead() == list(ALWAYS)


def test_a_home_that_cannot_be_written_names_the_variable_that_moves_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/home cannot be written .*METERSTREAM_HOME"):
        NativeStack(load(StackSettings, home=tmp_path / "file" / "home")).start(["nats"])


def test_an_unknown_process_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such process: nets; there are s3, nats, kafka"):
        NativeStack(load(StackSettings, home=tmp_path)).start(["nets"])


def test_a_pid_file_of_somebody_elses_process_is_not_taken_for_ours(tmp_path: Path) -> None:
    stack = NativeStack(load(StackSettings, home=tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "nats.pid").write_text('{"pid": 1, "started": 0}')
    assert not stack.is_running("nats")
    assert {state.name: state.state for state in stack.states()}["nats"] == "died"


def test_stopping_when_nothing_runs_stops_nothing(tmp_path: Path) -> None:
    assert NativeStack(load(StackSettings, home=tmp_path)).stop() == []


def test_setup_names_what_is_missing_where_python_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(setup.SetupFailed, match=r"Python 3\.11 or newer is missing: python3 is 3\.9\.2"):
        setup.use_new_enough_python()


def test_setup_does_a_step_once_for_the_same_inputs_and_again_for_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup, "STAMPS", tmp_path / "setup")
    done: list[str] = []
    for key in ("a", "a", "b"):

        def work(_: Callable[[str], None], key: str = key) -> None:
            done.append(key)

        setup.step("Some work", key, work)
    assert done == ["a", "b"]


def test_setup_does_a_step_again_that_broke_half_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "STAMPS", tmp_path / "setup")

    def interrupted(_: Callable[[str], None]) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.step("Some work", "a", interrupted)
    done: list[str] = []
    setup.step("Some work", "a", lambda _: done.append("a"))
    assert done == ["a"]


def test_setup_never_writes_through_a_hard_link_into_a_package_managers_cache(tmp_path: Path) -> None:
    cached, installed = tmp_path / "cached", tmp_path / "bin" / "spark-submit"
    cached.write_text("original")
    installed.parent.mkdir()
    installed.hardlink_to(cached)
    setup.replace_script(installed, "ours")
    assert (cached.read_text(), installed.read_text()) == ("original", "ours")


def test_no_registrys_host_is_named_in_setup_or_configuration() -> None:
    hosts = ("maven.org", "pypi.org", "pythonhosted", "apache.org/", "github.com")
    module = "github.com/versity/versitygw"  # a name of Go's
    files = [ROOT / "Makefile", ROOT / "tools" / "setup.py", *filter(Path.is_file, (ROOT / "config").rglob("*"))]
    assert [(file.name, host) for file in files for host in hosts if host in file.read_text().replace(module, "")] == []


@pytest.mark.parametrize("text", ["{", "[]", '{"mqtt_port": "x"}', '{"project": true}', "\x00"])
def test_a_home_that_does_not_know_its_ports_any_more_says_so(tmp_path: Path, text: str) -> None:
    assert damage(tmp_path) is None, "nothing was started"
    started_file(tmp_path).parent.mkdir()
    started_file(tmp_path).write_text(text)
    assert "started.json is damaged" in (damage(tmp_path) or "")
    remember(load(StackSettings, home=tmp_path), "native", cluster=False, critical=True)
    assert damage(tmp_path) is None


def test_a_pid_file_that_is_none_is_no_process(tmp_path: Path) -> None:
    stack = NativeStack(load(StackSettings, home=tmp_path))
    (tmp_path / "run").mkdir(parents=True, exist_ok=True)
    for text in ("[]", '{"pid": "x"}', "", "7"):
        (tmp_path / "run" / "nats.pid").write_text(text)
        assert not stack.is_running("nats")


def test_ctrl_c_while_processes_are_ended_waits_and_works_where_it_may() -> None:
    ended = []
    with uninterrupted() as interruptible:
        os.kill(os.getpid(), signal.SIGINT)
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            ended.append("not cut short")
        ended.append("went on")
    assert ended == ["went on"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
