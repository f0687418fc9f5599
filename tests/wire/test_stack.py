"""The real broker and the real Kafka, started, used, killed and stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import paho.mqtt.client as mqtt
import psutil
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from schemas.errors import ConfigError
from schemas.settings import load
from schemas.topics import READINGS, TOPICS
from stack.native import MARK, NativeStack, StackSettings, StartFailed
from tests.eventually import eventually

BROKERS = ["nats", "kafka"]
PORTS = ("mqtt_port", "nats_port", "nats_monitor_port", "kafka_port", "kafka_controller_port")


def free_ports(count):
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def left_of(home):
    marked = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK, "").endswith(f"@{home}") and process.status() != psutil.STATUS_ZOMBIE:
                marked.append(process)
    return marked


def open_ports(settings):
    opened = []
    for name in PORTS:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", getattr(settings, name)), timeout=1).close()
            opened.append(name)
    return opened


def fresh_stack(home):
    return NativeStack(load(StackSettings, home=home, **dict(zip(PORTS, free_ports(len(PORTS)), strict=True))))


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    stack = fresh_stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.start(BROKERS)
        yield stack
    finally:
        stack.stop()
    assert left_of(stack.home) == []
    assert open_ports(stack.settings) == []


@pytest.fixture
def own_stack(tmp_path):
    stack = fresh_stack(tmp_path)
    try:
        yield stack
    finally:
        stack.stop()
    assert left_of(tmp_path) == []
    assert open_ports(stack.settings) == []


def command(stack, *arguments):
    ports = {f"METERSTREAM_{name.upper()}": str(getattr(stack.settings, name)) for name in PORTS}
    return subprocess.Popen(
        [sys.executable, "-m", "stack", *arguments],
        env={**os.environ, **ports, "METERSTREAM_HOME": str(stack.home), "MODE": "native"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def mqtt_client(stack, name):
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
    client.connect("127.0.0.1", stack.settings.mqtt_port)
    return client


def test_every_topic_of_the_contract_exists_with_its_partitions(stack):
    topics = AdminClient({"bootstrap.servers": stack.settings.kafka_bootstrap}).list_topics(timeout=10).topics
    assert {t.name: t.partitions for t in TOPICS} == {t.name: len(topics[t.name].partitions) for t in TOPICS}


def test_what_is_produced_to_kafka_is_consumed(stack):
    producer = Producer({"bootstrap.servers": stack.settings.kafka_bootstrap})
    producer.produce(READINGS.name, key="m1", value=b"hello")
    assert producer.flush(10) == 0
    consumer = Consumer(
        {"bootstrap.servers": stack.settings.kafka_bootstrap, "group.id": "t", "auto.offset.reset": "earliest"}
    )
    try:
        consumer.subscribe([READINGS.name])
        message = eventually(lambda: consumer.poll(0.5), 20)
        assert (message.key(), message.value()) == (b"m1", b"hello")
    finally:
        consumer.close()


def test_what_is_published_over_mqtt_is_kept_for_an_absent_subscriber(stack):
    subscriber = mqtt_client(stack, "absent")
    subscribed = threading.Event()
    subscriber.on_subscribe = lambda *_: subscribed.set()
    subscriber.loop_start()
    subscriber.subscribe("meters/#", qos=1)
    assert subscribed.wait(5)
    subscriber.disconnect()
    subscriber.loop_stop()

    publisher = mqtt_client(stack, "publisher")
    publisher.loop_start()
    publisher.publish("meters/0/m1/readings/avro", b"hello", qos=1).wait_for_publish(5)
    publisher.disconnect()
    publisher.loop_stop()

    received = []
    again = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="absent", clean_session=False)
    again.on_message = lambda _client, _data, message: received.append((message.topic, message.payload))
    again.connect("127.0.0.1", stack.settings.mqtt_port)
    again.loop_start()
    try:
        eventually(lambda: received, 10)
    finally:
        again.disconnect()
        again.loop_stop()
    assert received == [("meters/0/m1/readings/avro", b"hello")]


def test_starting_again_starts_nothing_and_keeps_the_processes(stack):
    before = [stack.pid(name) for name in BROKERS]
    assert stack.start(BROKERS) == []
    assert [stack.pid(name) for name in BROKERS] == before


def test_another_process_sees_the_same_stack(stack):
    other = NativeStack(stack.settings)
    assert [state.state for state in other.states()][:2] == ["running", "running"]
    assert [other.pid(name) for name in BROKERS] == [stack.pid(name) for name in BROKERS]


def test_a_second_stack_on_the_same_ports_is_refused_by_the_variables_names(stack, tmp_path):
    second = NativeStack(stack.settings.model_copy(update={"home": tmp_path}))
    with pytest.raises(ConfigError, match=r"METERSTREAM_MQTT_PORT.*METERSTREAM_KAFKA_PORT"):
        second.start(BROKERS)
    assert left_of(tmp_path) == []


def test_a_killed_broker_is_dead_and_comes_back_with_what_it_had(stack):
    os.kill(stack.pid("nats"), signal.SIGKILL)
    eventually(lambda: stack.dead(BROKERS) == ["nats"])
    assert stack.start(BROKERS) == ["nats"]
    stack.restart("nats")
    assert stack.dead(BROKERS) == []


def test_a_process_that_dies_while_starting_shows_its_log_and_leaves_nothing(tmp_path):
    broken = tmp_path / "broken-server"
    broken.write_text("#!/bin/sh\nsleep 100 &\necho no luck today; exit 3\n")
    broken.chmod(0o755)
    stack = fresh_stack(tmp_path)
    stack = NativeStack(stack.settings.model_copy(update={"nats_server": broken}))
    with pytest.raises(StartFailed, match=r"(?s)nats died while starting.*no luck today"):
        stack.start(BROKERS)
    assert left_of(tmp_path) == []


def test_ctrl_c_while_starting_leaves_nothing(own_stack):
    process = command(own_stack, "up", *BROKERS)
    eventually(lambda: own_stack.is_running("kafka"), 20)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, process.communicate()
    assert left_of(own_stack.home) == []


def test_up_leaves_a_supervisor_that_brings_back_what_was_killed(own_stack):
    up = command(own_stack, "up", "nats")
    assert up.wait(30) == 0, up.communicate()
    killed = own_stack.pid("nats")
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: own_stack.pid("nats") not in {None, killed}, 15)


def test_down_works_without_the_supervisor_and_says_so_when_nothing_runs(own_stack):
    up = command(own_stack, "up", "nats")
    assert up.wait(30) == 0, up.communicate()
    os.kill(own_stack.pid("supervisor"), signal.SIGKILL)
    down = command(own_stack, "down")
    assert "nats stopped" in down.communicate(timeout=30)[0]
    assert left_of(own_stack.home) == []
    assert open_ports(own_stack.settings) == []
    again = command(own_stack, "down")
    assert "nothing was running." in again.communicate(timeout=30)[0]
    assert again.returncode == 0
