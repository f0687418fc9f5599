"""paho's client without a thread, which talks to its socket in large pieces.

paho asks the system three times for a packet that it reads, and twice for one that it writes: with messages of a
hundred bytes that is most of a message's cost. Here packets that have come together are read together, and what is
written goes out when the loop's turn ends. The methods overridden are paho's own, so its version is pinned
(pyproject.toml); `tests/wire/test_mqtt_client.py` holds what is relied on.
"""

import select
import time
from collections.abc import Sequence
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

READ_BYTES = 65_536  # some hundreds of readings
PACKETS = 200  # of a turn: the caller has others to look after
END_S = 5.0  # a broker that lives closes within milliseconds, on a full machine within a second
DISCONNECT = 0xE0


class LoopClient(mqtt.Client):
    """A client that lives in its caller's loop: see `turn`.

    Attributes:
        is_quiet_end: after a disconnection, whether the other side had sent nothing that was not handled.

    Args:
        client_id: of the session.
        end_s: how long the other side may take to take what waits at a disconnection, and to close.
        options: of paho's client.
    """

    def __init__(self, client_id: str, end_s: float = END_S, **options: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, **options)
        self._ahead, self._place = b"", 0
        self._unsent = bytearray()
        self.is_quiet_end = False
        self._end_s = end_s
        self.on_socket_open = self._begin_anew
        self.on_socket_register_write = lambda *_: None  # else each packet would be written by itself

    @property
    def has_ahead(self) -> bool:
        """Whether packets were read that are not handled; the socket does not show them."""
        return self.socket() is not None and self._place < len(self._ahead)

    def read(self) -> None:
        """Handles packets that have come together, at most as many as a turn should take."""
        for _ in range(PACKETS):
            if self.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS or not self.has_ahead:
                return

    def want_write(self) -> bool:
        """Whether something waits for the socket."""
        return bool(self._unsent) or super().want_write()

    def leave(self) -> None:
        """Disconnects: sends what waits, and reads to the other side's end."""
        self.disconnect()
        self.loop_write()

    def loop_write(self) -> MQTTErrorCode:
        """Writes what waits, as far as the socket takes it."""
        code = super().loop_write()
        if self._unsent and self.socket() is not None:
            try:
                self._write()
            except BlockingIOError:
                pass
            except OSError:
                return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        return code

    def _begin_anew(self, *_: Any) -> None:
        self._ahead, self._place = b"", 0
        self._unsent.clear()
        self.is_quiet_end = False

    def _sock_recv(self, bufsize: int) -> bytes:
        if self._place == len(self._ahead):
            self._ahead, self._place = super()._sock_recv(READ_BYTES), 0
        piece = self._ahead[self._place : self._place + bufsize]
        self._place += len(piece)
        return piece

    def _sock_send(self, buf: bytes | bytearray) -> int:
        self._unsent += buf
        if buf[0] == DISCONNECT:  # paho closes the socket next
            self._end()
        return len(buf)

    def _end(self) -> None:
        """Sends what waits, and reads to the other side's end: closing with unread bytes would take back what was sent.

        Raises:
            TimeoutError: the other side takes nothing.
        """
        is_handled = not self.has_ahead
        sock: Any = self.socket()
        if sock is None:
            return
        sock.settimeout(self._end_s)
        while self._unsent:
            self._write()
        came = super()._sock_recv(READ_BYTES)
        self.is_quiet_end = is_handled and not came
        until = time.monotonic() + self._end_s
        while came and time.monotonic() < until:
            came = super()._sock_recv(READ_BYTES)

    def _write(self) -> None:
        del self._unsent[: super()._sock_send(self._unsent)]


def turn(clients: Sequence[LoopClient], timeout_s: float) -> None:
    """Waits for packets, at most so long, handles them, and writes what is to be written.

    A client whose connection is lost has no socket then.
    """
    known = {sock: client for client in clients if (sock := client.socket()) is not None}
    if not known:
        time.sleep(timeout_s)
        return
    writing = [sock for sock, client in known.items() if client.want_write()]
    ahead = [sock for sock, client in known.items() if client.has_ahead]
    readable, writable, _ = select.select(list(known), writing, [], 0.0 if ahead else timeout_s)
    for sock in {*readable, *ahead}:
        known[sock].read()
    for sock, client in known.items():
        if sock in writable or client.want_write():
            client.loop_write()
        client.loop_misc()
