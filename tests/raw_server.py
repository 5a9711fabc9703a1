"""An HTTP server for tests that answers with any bytes, also with bytes that are not HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Answer = Callable[[str, dict[str, str]], "list[bytes]"]


@contextmanager
def serving(answer: Answer, pause: float = 0.0) -> Iterator[str]:
    """Yields the URL of a server on this machine.

    answer: returns the pieces of an answer. Takes the request's line ("GET /x.tar HTTP/1.1") and
        headers, with names in lower case.
    pause: seconds between the pieces.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head and (received := connection.recv(65536)):
                head += received
            if not head:  # some clients open a connection that they do not use
                return
            line, *rest = head.decode("latin-1").split("\r\n")
            headers = {k.lower(): v for k, _, v in (row.partition(": ") for row in rest)}
            for piece in answer(line, headers):
                connection.sendall(piece)
                if stopped.wait(pause):
                    return

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopped.set()
        listener.close()


def ok(content: bytes, *headers: str, length: bool = True) -> bytes:
    """Returns a whole answer with status 200."""
    stated = [f"Content-Length: {len(content)}"] if length else []
    lines = ["HTTP/1.1 200 OK", *stated, "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + content
