"""Post as one of the clients people use, in a process of its own; print one JSON object.

Each gets what is best for it: the same encoded body again and again (no queue, no encoding), four
threads or tasks with a connection each, headers made once. So what is measured is the client.
``grpcio`` speaks HTTP/2 and needs a server of its own, ``grpcio-sink``, which is Python as well. So
its rate is that of the two together, its CPU that of the client.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import CLUSTER_ID, MEMBER_ID, cpu_s, forget_peak, status_kib

CONNECTIONS = 4
WARMUP_S = 0.3
#: The slowest clients need some seconds for a few messages of 64 MiB.
LONGEST_S = 10.0
HEADERS = {
    "Content-Type": "application/protobuf",
    "X-Etcd-Cluster-Id": f"{CLUSTER_ID:x}",
    "X-Min-Cluster-Version": "3.0.0",
    "X-Server-From": f"{MEMBER_ID:x}",
    "X-Server-Version": "3.5.1",
}
GRPC_METHOD = "/raft.Raft/Post"
GRPC_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

Post = Callable[[], None]


def expect_204(status: int) -> None:
    if status != 204:
        raise SystemExit(f"answered {status}")


@contextmanager
def open_requests(port: int, body: bytes) -> Iterator[Post]:
    import requests

    with requests.Session() as session:
        session.headers.update(HEADERS)
        session.trust_env = False  # it looks for proxies on every request
        yield lambda: expect_204(
            session.post(f"http://127.0.0.1:{port}/raft", data=body).status_code
        )


@contextmanager
def open_httpx(port: int, body: bytes) -> Iterator[Post]:
    import httpx

    url = f"http://127.0.0.1:{port}/raft"
    with httpx.Client(headers=HEADERS, timeout=30, trust_env=False) as client:
        yield lambda: expect_204(client.post(url, content=body).status_code)


@contextmanager
def open_pycurl(port: int, body: bytes) -> Iterator[Post]:
    import pycurl

    curl = pycurl.Curl()
    curl.setopt(pycurl.URL, f"http://127.0.0.1:{port}/raft")
    curl.setopt(pycurl.PROXY, "")
    # Without Expect libcurl would wait for a "100 Continue" before a large body.
    headers = [*(f"{name}: {value}" for name, value in HEADERS.items()), "Expect:"]
    curl.setopt(pycurl.HTTPHEADER, headers)
    curl.setopt(pycurl.POST, 1)
    curl.setopt(pycurl.POSTFIELDS, body)

    def post() -> None:
        curl.perform()
        expect_204(curl.getinfo(pycurl.RESPONSE_CODE))

    yield post
    curl.close()


@contextmanager
def open_grpcio(port: int, body: bytes) -> Iterator[Post]:
    import grpc

    # A local pool of subchannels gives each of the four a connection of its own.
    options = (*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        call = channel.unary_unary(GRPC_METHOD)
        yield lambda: call(body, wait_for_ready=True)


OPENERS = {
    "requests": open_requests,
    "httpx": open_httpx,
    "pycurl": open_pycurl,
    "grpcio": open_grpcio,
}
SUBJECTS = (*OPENERS, "aiohttp")
MODULES = {"grpcio": "grpc"}


def missing(subject: str) -> bool:
    """Whether the package of ``subject`` is not installed."""
    return importlib.util.find_spec(MODULES.get(subject, subject)) is None


class Measurement:
    """Counts answers, and takes the time, the CPU and the memory between two moments."""

    def __init__(self) -> None:
        self.answered = [0] * CONNECTIONS
        self.is_over = False
        self._rss_kib = status_kib("VmRSS")  # the payload is there already
        forget_peak()

    @property
    def is_enough(self) -> bool:
        """Whether a figure can be made of it: two of a connection, or the time is up."""
        waited_s = time.perf_counter() - self._start
        return sum(self.answered) - self._sent >= 2 * CONNECTIONS or waited_s > LONGEST_S

    def begin(self) -> None:
        self._start, self._cpu_s, self._sent = time.perf_counter(), cpu_s(), sum(self.answered)

    def end(self) -> dict[str, Any]:
        sent = sum(self.answered) - self._sent
        took, took_cpu_s = time.perf_counter() - self._start, cpu_s() - self._cpu_s
        self.is_over = True
        return {
            "messages": sent,
            "seconds": took,
            "messages_per_s": sent / took,
            "cpu_us_per_message": took_cpu_s * 1e6 / max(sent, 1),
            "rss_above_payload_mb": (status_kib("VmHWM") - self._rss_kib) * 1024 / 1e6,
        }


def measure_threads(subject: str, port: int, body: bytes, args: argparse.Namespace) -> Any:
    measurement = Measurement()

    def work(n: int, post: Post) -> None:
        while not measurement.is_over:
            post()
            measurement.answered[n] += 1

    with ExitStack() as stack:
        posts = [stack.enter_context(OPENERS[subject](port, body)) for _ in range(CONNECTIONS)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            futures = [pool.submit(work, n, post) for n, post in enumerate(posts)]
            time.sleep(WARMUP_S)
            measurement.begin()
            time.sleep(args.seconds)
            while not measurement.is_enough:
                time.sleep(0.01)
            result = measurement.end()
        for future in futures:
            future.result()
        times_ns = []
        for _ in range(args.lone):
            start_ns = time.perf_counter_ns()
            posts[0]()
            times_ns.append(time.perf_counter_ns() - start_ns)
    return {**result, "lone_ns": times_ns, "total": sum(measurement.answered) + args.lone}


async def measure_aiohttp(port: int, body: bytes, args: argparse.Namespace) -> Any:
    import aiohttp

    measurement = Measurement()
    url = f"http://127.0.0.1:{port}/raft"
    async with aiohttp.ClientSession(
        headers=HEADERS, connector=aiohttp.TCPConnector(limit=CONNECTIONS)
    ) as session:

        async def post() -> None:
            async with session.post(url, data=body) as answer:
                expect_204(answer.status)

        async def work(n: int) -> None:
            while not measurement.is_over:
                await post()
                measurement.answered[n] += 1

        tasks = [asyncio.create_task(work(n)) for n in range(CONNECTIONS)]
        await asyncio.sleep(WARMUP_S)
        measurement.begin()
        await asyncio.sleep(args.seconds)
        while not measurement.is_enough:
            await asyncio.sleep(0.01)
        result = measurement.end()
        await asyncio.gather(*tasks)
        times_ns = []
        for _ in range(args.lone):
            start_ns = time.perf_counter_ns()
            await post()
            times_ns.append(time.perf_counter_ns() - start_ns)
    return {**result, "lone_ns": times_ns, "total": sum(measurement.answered) + args.lone}


def serve_grpcio() -> None:
    """Count unary calls until stdin ends, as the C sink counts posts."""
    import grpc

    lock, requests, body_bytes = threading.Lock(), 0, 0

    def answer(body: bytes, _context: object) -> bytes:
        nonlocal requests, body_bytes
        with lock:
            requests += 1
            body_bytes += len(body)
        return b""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, call: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(CONNECTIONS), (Handler(),), options=GRPC_OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listening {port}", flush=True)
    sys.stdin.read()
    server.stop(None).wait()
    print(json.dumps({"requests": requests, "body_bytes": body_bytes, "gets": 0, "bad": 0}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=(*SUBJECTS, "grpcio-sink"))
    parser.add_argument("--port", type=int)
    parser.add_argument("--size", type=int, default=188, help="bytes of the body")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--lone", type=int, default=200, help="posts one at a time afterwards")
    args = parser.parse_args()
    if args.subject == "grpcio-sink":
        serve_grpcio()
        return
    body = b"x" * args.size
    if args.subject == "aiohttp":
        result = asyncio.run(measure_aiohttp(args.port, body, args))
    else:
        result = measure_threads(args.subject, args.port, body, args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
