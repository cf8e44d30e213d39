"""A TLS server on loopback that speaks HTTP/2 and refuses a handshake without it, as RFC 7301 wants.

Python's own TLS cannot send the alert `no_application_protocol`: the server looks for `h2` in the client's first message.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded

ALERT = bytes([0x15, 3, 3, 0, 2, 2, 120])  # a record with a fatal alert: no_application_protocol


@dataclass
class Http2Server:
    port: int
    handshakes: list[bool] = field(default_factory=list)  # for each connection, True if the client offered HTTP/2
    requests: list[dict[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def http2_server(context: ssl.SSLContext, answer: Callable[[bytes], list[bytes]]) -> Iterator[Http2Server]:
    """`answer` gets a request's body and returns the pieces of the response."""
    context.set_alpn_protocols(["h2"])
    listener = socket.create_server(("127.0.0.1", 0))
    server = Http2Server(listener.getsockname()[1])

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            offered = b"\x02h2" in connection.recv(4096, socket.MSG_PEEK)
            server.handshakes.append(offered)
            if not offered:
                connection.recv(4096)
                connection.sendall(ALERT)
                return
            with context.wrap_socket(connection, server_side=True) as tls:
                talk(tls)

    def talk(tls: ssl.SSLSocket) -> None:
        state = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        state.initiate_connection()
        tls.sendall(state.data_to_send())
        bodies: dict[int, bytes] = {}
        while data := tls.recv(65536):
            for event in state.receive_data(data):
                if isinstance(event, RequestReceived):
                    server.requests.append(dict(event.headers))  # type: ignore[arg-type]
                    bodies[event.stream_id] = b""
                elif isinstance(event, DataReceived):
                    bodies[event.stream_id] += event.data
                    state.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, StreamEnded):
                    state.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/json")])
                    for piece in answer(bodies.pop(event.stream_id)):
                        state.send_data(event.stream_id, piece)
                    state.end_stream(event.stream_id)
            tls.sendall(state.data_to_send())

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
