"""What trustme does, by the ``openssl`` command.

For a Python that trustme cannot be installed for: it needs cffi, which has no free-threaded 3.13.
"""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path

__all__ = ["CA"]

_FORMAT = "%Y%m%d%H%M%SZ"

_CONFIG = """
[ca]
default_ca = ours
[ours]
dir = {directory}
database = $dir/index.txt
new_certs_dir = $dir
certificate = $dir/ca.pem
private_key = $dir/ca.key
rand_serial = yes
unique_subject = no
default_md = sha256
policy = anything
default_crl_days = 1
[anything]
organizationName = optional
commonName = optional
[req]
distinguished_name = nobody
prompt = no
[nobody]
O = raft-pipeline tests
{common_name}
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, digitalSignature, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = clientAuth, serverAuth
authorityKeyIdentifier = keyid
subjectAltName = critical, {names}
"""


class Pem:
    """Text in a file's form, as trustme's ``Blob``."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def bytes(self) -> bytes:
        """Return it."""
        return self._data

    def write_to_path(self, path: Path) -> None:
        """Write it to a file."""
        path.write_bytes(self._data)


class Issued:
    """A certificate and its key, as trustme's ``LeafCert``."""

    def __init__(self, cert: bytes, key: bytes) -> None:
        self.cert_chain_pems = [Pem(cert)]
        self.private_key_pem = Pem(key)
        self.private_key_and_cert_chain_pem = Pem(key + cert)


class CA:
    """An authority, as ``trustme.CA``, of what the tests use of it."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="pipeline-ca-"))
        weakref.finalize(self, shutil.rmtree, self._directory)
        (self._directory / "index.txt").touch()
        self._configure(("DNS:authority.test",), None)
        self._key("ca.key")
        config = ("-config", "config", "-extensions", "authority")
        self._openssl("req", "-x509", "-new", "-key", "ca.key", "-out", "ca.pem", *config)
        self.cert_pem = Pem((self._directory / "ca.pem").read_bytes())
        self.private_key_pem = Pem((self._directory / "ca.key").read_bytes())

    def issue_cert(
        self,
        *identities: str,
        common_name: str | None = None,
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
    ) -> Issued:
        """Make a certificate for names and addresses."""
        now = datetime.datetime.now(datetime.UTC)
        end = _aware(not_after or now + datetime.timedelta(days=365))
        begin = _aware(not_before or min(now, end) - datetime.timedelta(days=1))
        self._configure(tuple(_name(identity) for identity in identities), common_name)
        self._key("leaf.key")
        config = ("-config", "config")
        self._openssl("req", "-new", "-key", "leaf.key", "-out", "leaf.csr", *config)
        dates = ("-startdate", begin.strftime(_FORMAT), "-enddate", end.strftime(_FORMAT))
        self._openssl(
            *("ca", "-batch", "-notext", "-in", "leaf.csr", "-out", "leaf.pem"),
            *("-extensions", "leaf", *dates, *config),
        )
        read = [(self._directory / name).read_bytes() for name in ("leaf.pem", "leaf.key")]
        return Issued(*read)

    def _key(self, name: str) -> None:
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", name)

    def _configure(self, names: tuple[str, ...], common_name: str | None) -> None:
        text = _CONFIG.format(
            directory=self._directory,
            names=", ".join(names),
            common_name=f"CN = {common_name}" if common_name else "",
        )
        (self._directory / "config").write_text(text)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(
            ("openssl", *arguments),
            cwd=self._directory,
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )


def _aware(time: datetime.datetime) -> datetime.datetime:
    return time if time.tzinfo is not None else time.replace(tzinfo=datetime.UTC)


def _name(identity: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(identity)}"
    except ValueError:
        return f"DNS:{identity.encode('idna').decode()}"
