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
DISCONNECT = 0xE0


class LoopClient(mqtt.Client):
    """A client that lives in its caller's loop: see `turn`.

    Args:
        client_id: of the session.
        options: of paho's client.
    """

    def __init__(self, client_id: str, **options: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, **options)
        for waker in (self._sockpairR, self._sockpairW):  # who wakes a thread; there is none
            if waker is not None:
                waker.close()
        self._sockpairR = self._sockpairW = None
        self._ahead, self._place = b"", 0
        self._unsent = bytearray()
        self.on_socket_open = self._begin_anew
        self.on_socket_register_write = lambda *_: None  # else each packet would be written by itself

    def read(self) -> None:
        """Handles the packets that have come together; of what is read ahead the socket tells nobody."""
        while self.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS and self._place < len(self._ahead):
            pass

    def want_write(self) -> bool:
        """Whether something waits for the socket."""
        return bool(self._unsent) or super().want_write()

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

    def _sock_recv(self, bufsize: int) -> bytes:
        if self._place == len(self._ahead):
            self._ahead, self._place = super()._sock_recv(READ_BYTES), 0
        piece = self._ahead[self._place : self._place + bufsize]
        self._place += len(piece)
        return piece

    def _sock_send(self, buf: bytes | bytearray) -> int:
        self._unsent += buf
        if buf[0] == DISCONNECT:  # paho closes the socket next
            sock = self.socket()
            if sock is not None:
                sock.setblocking(True)
            while self._unsent:
                self._write()
        return len(buf)

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
    readable, writable, _ = select.select(list(known), writing, [], timeout_s)
    for sock in readable:
        known[sock].read()
    for sock, client in known.items():
        if sock in writable or client.want_write():
            client.loop_write()
        client.loop_misc()
