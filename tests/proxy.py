"""A TCP proxy between a client and a server that the tests use, which breaks when it is told to."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Callable

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that lets a socket be closed with a reset."""


class Proxy:
    """Hands on what clients and a server send each other.

    Attributes:
        port: where it listens, on 127.0.0.1.
        on_sent: called with what a client sends, before it is handed on; it may call `cut`, or
            `lose_answer`. It is called in the connection's own thread.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.on_sent: Callable[[bytes], object] = lambda sent: None
        self._sockets: list[socket.socket] = []
        self._losing = False

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self.refuse()
        self.cut()

    def cut(self) -> None:
        """Break the connections that there are."""
        self._losing = False
        # Those that are made meanwhile, by a client that tries again, stay.
        ends, self._sockets = self._sockets, []
        for end in ends:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):
                end.close()

    def refuse(self) -> None:
        """Take no more connections; those that there are go on."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def lose_answer(self) -> None:
        """Hand on what is being sent, wait until the server has answered, and break then."""
        self._losing = True

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                threading.Thread(target=self._hand_on, args=(client, server), daemon=True).start()

    def _hand_on(self, client: socket.socket, server: socket.socket) -> None:
        # What the sockets raise when they are closed under the loop.
        with suppress(OSError, ValueError), client, server, selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ)
            ready.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    if not self._hand_on_from(key.fileobj, client, server):
                        return

    def _hand_on_from(self, end, client, server) -> bool:
        data = end.recv(65536)
        if not data:
            return False
        if end is client:
            self.on_sent(data)
            server.sendall(data)
        elif self._losing:
            self.cut()
            return False
        else:
            client.sendall(data)
        return True


def proxy_of(url: str) -> Proxy:
    """Return a proxy to the server of a URL."""
    parts = urlsplit(url)
    default = {"postgresql": 5432, "mysql": 3306}[parts.scheme]
    return Proxy(parts.hostname, parts.port or default)


def through(proxy: Proxy, url: str) -> str:
    """Return a URL whose server is reached through a proxy."""
    parts = urlsplit(url)
    credentials = parts.netloc.rpartition("@")[0]
    netloc = f"{credentials}@127.0.0.1:{proxy.port}" if credentials else f"127.0.0.1:{proxy.port}"
    return urlunsplit(parts._replace(netloc=netloc))
