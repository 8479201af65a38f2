"""A peer in a process of its own: answers 204 and counts what it got in a file both sides map.

Run as ``sink.py COUNTER_FILE [CERT KEY CA]``; prints its port. The file's first 8 bytes are the
number of whole requests. With certificates it speaks TLS. Ends with its standard input.
"""

from __future__ import annotations

import mmap
import selectors
import socket
import ssl
import struct
import sys

OK = b"HTTP/1.1 204 No Content\r\nX-Etcd-Cluster-Id: 1\r\n\r\n"
READ_BYTES = 1 << 20


class Stream:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.head = b""
        self.missing = 0  # bytes of the body

    def read(self, data: memoryview) -> int:
        """Take what was read; the number of requests it completes."""
        whole = 0
        while data:
            if self.missing:
                n = min(self.missing, len(data))
                self.missing -= n
                data = data[n:]
                whole += self.missing == 0
                continue
            known = len(self.head)
            self.head += bytes(data[:4096])
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                data = data[4096:]
                continue
            data = data[end + 4 - known :]
            fields = self.head[:end].lower().split(b"content-length:")[1]
            self.missing = int(fields.split(b"\r\n")[0])
            self.head = b""
            whole += self.missing == 0
        return whole


def main() -> None:
    with open(sys.argv[1], "r+b") as file:
        counter = mmap.mmap(file.fileno(), 8)
    context = None
    if len(sys.argv) > 2:
        cert, key, ca = sys.argv[2:]
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
        context.load_cert_chain(cert, key)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    print(listener.getsockname()[1], flush=True)
    buffer = bytearray(READ_BYTES)
    count = 0
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                sock, _ = listener.accept()
                if context is not None:
                    sock = context.wrap_socket(sock, server_side=True)
                selector.register(sock, selectors.EVENT_READ, Stream(sock))
                continue
            stream = key.data
            try:
                while True:
                    n = stream.sock.recv_into(buffer)
                    whole = stream.read(memoryview(buffer)[:n])
                    if whole:
                        count += whole
                        struct.pack_into("=Q", counter, 0, count)
                        stream.sock.sendall(OK * whole)
                    # Of what TLS has read ahead the selector says nothing.
                    if context is None or stream.sock.pending() == 0:
                        break
            except OSError:
                n = 0
            if n == 0:
                selector.unregister(stream.sock)
                stream.sock.close()


if __name__ == "__main__":
    main()
