"""A server for TLS and plain sending alike: reads POSTs, answers 204. One thread a connection.

Slower than ``c/sink.c``, which knows no TLS, so rates against it mean nothing. The sender's CPU
does: it is another process.

usage: tls_sink.py [CERT KEY CA]
  stdout  "listening PORT"
  stdin   must be a pipe; its end is the order to stop
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading

ANSWER = b"HTTP/1.1 204 No Content\r\nDate: Sat, 21 Nov 2026 00:00:00 GMT\r\n\r\n"
LENGTH = b"Content-Length:"
STEP_BYTES = 1 << 20


def serve(sock: socket.socket, context: ssl.SSLContext | None) -> None:
    room = memoryview(bytearray(STEP_BYTES))
    with contextlib.suppress(OSError):
        if context is not None:
            sock = context.wrap_socket(sock, server_side=True)
        while True:
            head = b""
            while (end := head.find(b"\r\n\r\n")) < 0:
                data = sock.recv(65536)
                if not data:
                    return
                head += data
            # One request at a time: what follows the head is its body.
            size = int(head[head.index(LENGTH) + len(LENGTH) : end].split(b"\r\n", 1)[0])
            left = size - (len(head) - end - 4)
            while left > 0:
                got = sock.recv_into(room, min(left, STEP_BYTES))
                if got == 0:
                    return
                left -= got
            sock.sendall(ANSWER)


def main() -> None:
    context = None
    if len(sys.argv) > 1:
        cert, key, ca = sys.argv[1:]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED

    listener = socket.create_server(("127.0.0.1", 0))
    print(f"listening {listener.getsockname()[1]}", flush=True)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(sock, context), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
