"""The client against a server's side of the socket: packets in pieces, packets together, a write that is refused."""

import socket
import threading
from collections.abc import Iterator

import paho.mqtt.client as mqtt
import pytest

from mqtt_io.client import LoopClient, turn
from tests.eventually import turning

CONNACK, SUBACK = b"\x20\x02\x00\x00", b"\x90\x03\x00\x01\x01"


def publication(mid: int, payload: bytes) -> bytes:
    topic = b"meters/0/m1/readings/avro"
    body = len(topic).to_bytes(2) + topic + mid.to_bytes(2) + payload
    length, rest = bytearray(), len(body)
    while True:
        rest, digit = divmod(rest, 128)[0], rest % 128
        length.append(digit | 0x80 if rest else digit)
        if not rest:
            return b"\x32" + bytes(length) + body


class Broker:
    """One connection, byte by byte as a test wants it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.got = bytearray()

    def accept(self) -> None:
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(10)
        assert self.connection.recv(1_000)[0] == 0x10
        self.connection.sendall(CONNACK)

    def read_until(self, count: int) -> bytes:
        while len(self.got) < count:
            self.got += self.connection.recv(65_536)
        return bytes(self.got)


@pytest.fixture
def broker() -> Iterator[Broker]:
    broker = Broker()
    yield broker
    broker.connection.close()
    broker.listener.close()


def connected(broker: Broker, **options: float) -> LoopClient:
    client = LoopClient("c", clean_session=False, manual_ack=True, reconnect_on_failure=False, **options)
    accepting = threading.Thread(target=broker.accept)
    accepting.start()
    client.connect("127.0.0.1", broker.port, keepalive=30)
    turning(client, client.is_connected)
    accepting.join()
    return client


@pytest.fixture
def client(broker: Broker) -> LoopClient:
    return connected(broker)


def received(client: LoopClient) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    client.on_message = lambda _client, _data, message: found.append((message.mid, bytes(message.payload)))
    return found


def test_packets_that_come_together_are_handled_in_one_turn(client: LoopClient, broker: Broker) -> None:
    found = received(client)
    broker.connection.sendall(b"".join(publication(mid, b"x" * 100) for mid in range(1, 301)))
    turning(client, lambda: len(found) == 300)
    assert found == [(mid, b"x" * 100) for mid in range(1, 301)]


def test_a_packet_that_comes_in_pieces_is_handled_once_and_whole(client: LoopClient, broker: Broker) -> None:
    found = received(client)
    whole = publication(1, b"y" * 70_000) + publication(2, b"z")
    for start in range(0, len(whole), 9_999):
        broker.connection.sendall(whole[start : start + 9_999])
        turn([client], 0.01)
    turning(client, lambda: len(found) == 2)
    assert found == [(1, b"y" * 70_000), (2, b"z")]


def test_acknowledgements_of_a_turn_go_out_together_and_in_order(client: LoopClient, broker: Broker) -> None:
    def acknowledge(client: mqtt.Client, _: object, message: mqtt.MQTTMessage) -> None:
        client.ack(message.mid, 1)

    client.on_message = acknowledge
    broker.connection.sendall(b"".join(publication(mid, b"x") for mid in range(1, 101)))
    turning(client, lambda: not client.want_write())
    expected = b"".join(b"\x40\x02" + mid.to_bytes(2) for mid in range(1, 101))
    assert broker.read_until(len(expected)) == expected


def test_what_the_socket_does_not_take_goes_out_later(client: LoopClient, broker: Broker) -> None:
    payload = b"w" * 1_000_000
    for _ in range(10):
        client.publish("t", payload, qos=1)
    client.loop_write()
    assert client.want_write(), "the socket took ten megabytes at once"
    reading = threading.Thread(target=broker.read_until, args=(10_000_000,))
    reading.start()
    turning(client, lambda: not client.want_write(), 30)
    reading.join()
    assert broker.got.count(payload) == 10


def test_a_lost_connection_leaves_no_socket_and_the_next_one_begins_anew(client: LoopClient, broker: Broker) -> None:
    found = received(client)
    broker.connection.sendall(publication(1, b"cut off")[:-3])
    turning(client, lambda: client._place == len(client._ahead) > 0)
    broker.connection.close()
    turning(client, lambda: client.socket() is None)
    accepting = threading.Thread(target=broker.accept)
    accepting.start()
    assert client.reconnect() == mqtt.MQTT_ERR_SUCCESS
    turning(client, client.is_connected)
    accepting.join()
    broker.connection.sendall(publication(1, b"whole"))
    turning(client, lambda: found)
    assert found == [(1, b"whole")]


def test_a_disconnection_sends_what_waits_first(client: LoopClient, broker: Broker) -> None:
    client.ack(7, 1)
    broker.connection.shutdown(socket.SHUT_WR)
    client.disconnect()
    client.loop_write()
    assert broker.read_until(6) == b"\x40\x02\x00\x07\xe0\x00"
    assert client.is_quiet_end


def test_a_disconnection_from_a_broker_that_takes_nothing_ends(broker: Broker) -> None:
    client = connected(broker, end_s=0.1)
    for _ in range(10):
        client.publish("t", b"w" * 1_000_000, qos=1)
    client.disconnect()
    client.loop_write()
    assert client.socket() is None


def test_whether_anything_came_behind_the_last_handled_packet_is_known_at_the_end(
    client: LoopClient, broker: Broker
) -> None:
    broker.connection.sendall(publication(1, b"too late"))
    broker.connection.shutdown(socket.SHUT_WR)
    client.disconnect()
    client.loop_write()
    assert not client.is_quiet_end
