"""Ports of this machine: whether one is free, who has it, and what answers there."""

import contextlib
import http.client
import socket

import psutil

from stack.processes import MARK


def is_free(port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        # As the servers do: a connection of an earlier run that still winds down is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def user_of(port: int) -> str:
    """Who listens there, as the end of a sentence; empty where the system does not let us see it."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                part, _, other = process.environ().get(MARK, "").partition("@")
                stack = f", {part} of the stack in {other}" if other else ""
                return f" by {process.name()} (pid {connection.pid}{stack})"
    return ""


def accepts(port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def http_answer(port: int, path: str, timeout_s: float = 1.0) -> bytes | None:
    """What a process of ours answers over HTTP; None where it does not, or with an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
