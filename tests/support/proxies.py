"""haproxy and nginx in front of a peer, as processes of a test's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.examples.etcd import free_port
from tests.support.tls import Authority
from tests.support.waiting import eventually, is_listening

#: How long a proxy keeps a connection that carries nothing.
KEEP_ALIVE_MS = 200
#: What a peer's certificate must have among its names: nginx asks for no address there.
PEER_NAME = "peer.test"
NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def missing(name: str) -> str:
    """Say what of a proxy is not installed; "" if all is."""
    if find(name) is None:
        return f"{name} is not installed"
    if name == "nginx" and not NGINX_STREAM.exists():
        return "nginx's stream module is not installed"
    return ""


def find(name: str) -> str | None:
    """Find a program that may be where only root looks."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))


@dataclass
class Way:
    """From a port of the proxy to one of a peer, both on 127.0.0.1."""

    to: int
    terminates: bool = False
    servers: int = 1  # of haproxy, as those below: it is to take the peer for so many
    check: str = ""  # what follows each "server"
    options: tuple[str, ...] = ()  # lines for them all
    port: int = field(default_factory=free_port)  # the proxy's own

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"


@contextlib.contextmanager
def haproxy(directory: Path, authority: Authority, *ways: Way) -> Iterator[None]:
    """Run haproxy until the context ends."""
    pem = directory / "haproxy.pem"
    pem.write_bytes(b"".join(path.read_bytes() for path in authority.issue("haproxy")))
    proof = f"crt {pem} ca-file {authority.ca_file}"
    lines = [
        *("global", " maxconn 500", "defaults", " timeout connect 5s", " timeout client 60s"),
        *(" timeout server 60s", f" timeout http-keep-alive {KEEP_ALIVE_MS}ms"),
    ]
    for number, way in enumerate(ways):
        lines.append(f"listen way{number}")
        if way.terminates:
            lines += [
                *(" mode http", f" bind 127.0.0.1:{way.port} ssl {proof} verify required"),
                f" server peer 127.0.0.1:{way.to} ssl {proof} verify required",
            ]
        else:
            lines += [" mode tcp", f" bind 127.0.0.1:{way.port}"]
            for peer in range(way.servers):
                lines.append(f" server peer{peer} 127.0.0.1:{way.to} {way.check}")
        lines += [f" {option}" for option in way.options]
    settings = directory / "haproxy.cfg"
    settings.write_text("\n".join(lines) + "\n")
    with running(directory, "haproxy", ("-db", "-f", str(settings)), ways):
        yield


@contextlib.contextmanager
def nginx(directory: Path, authority: Authority, *ways: Way) -> Iterator[None]:
    """Run nginx until the context ends."""
    cert, key = authority.issue("nginx")
    streams, servers = [], []
    for number, way in enumerate(ways):
        if not way.terminates:
            streams.append(
                f"server {{ listen 127.0.0.1:{way.port}; proxy_pass 127.0.0.1:{way.to}; }}"
            )
            continue
        servers.append(f"""
            upstream way{number} {{
                server 127.0.0.1:{way.to};
                keepalive 8;
                keepalive_timeout {KEEP_ALIVE_MS}ms;
            }}
            server {{
                listen 127.0.0.1:{way.port} ssl;
                ssl_client_certificate {authority.ca_file};
                ssl_verify_client on;
                location / {{
                    proxy_pass https://way{number};
                    proxy_ssl_name {PEER_NAME};
                }}
            }}""")
    settings = directory / "nginx.conf"
    settings.write_text(f"""
        load_module {NGINX_STREAM};
        user {_user()};
        daemon off;
        worker_processes 1;
        pid {directory}/nginx.pid;
        error_log stderr;
        events {{}}
        stream {{ {" ".join(streams)} }}
        http {{
            access_log off;
            client_body_temp_path {directory}/bodies;
            proxy_temp_path {directory}/answers;
            fastcgi_temp_path {directory}/fastcgi;
            uwsgi_temp_path {directory}/uwsgi;
            scgi_temp_path {directory}/scgi;
            keepalive_timeout {KEEP_ALIVE_MS}ms;
            client_max_body_size 0;
            proxy_request_buffering off;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            ssl_certificate {cert};
            ssl_certificate_key {key};
            proxy_ssl_certificate {cert};
            proxy_ssl_certificate_key {key};
            proxy_ssl_trusted_certificate {authority.ca_file};
            proxy_ssl_verify on;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            {"".join(servers)}
        }}""")
    with running(directory, "nginx", ("-p", str(directory), "-c", str(settings)), ways):
        yield


def _user() -> str:
    # For the workers when root starts nginx; everybody else stays who he is.
    return "root" if os.geteuid() == 0 else "nobody"


@contextlib.contextmanager
def running(
    directory: Path, name: str, arguments: tuple[str, ...], ways: tuple[Way, ...]
) -> Iterator[None]:
    """Run a proxy; what it says is printed at the end: pytest shows it when the test failed."""
    program = find(name)
    assert program is not None
    log_path = directory / f"{name}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            (program, *arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        for way in ways:
            eventually(
                lambda url=way.url: process.poll() is not None or is_listening(url),
                f"{name} listens",
            )
        assert process.poll() is None, log_path.read_text()
        yield
    finally:
        process.terminate()
        process.wait()
        print(log_path.read_text(errors="replace")[-4000:])
