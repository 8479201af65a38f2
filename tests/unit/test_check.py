"""``benchmarks/check.py``: how the instructions of a message over TLS are told from OpenSSL's."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: As callgrind writes it: a call's line has what the called one counted for itself already.
PROFILE = """\
events: Ir

ob=/site/pipeline/_core.cpython-311-x86_64-linux-gnu.so
fl=_core.c
fn=loop
10 7
cob=/usr/lib/x86_64-linux-gnu/libssl.so.3
cfi=???
cfn=SSL_write
calls=2 0
11 900
12 5

ob=/usr/lib/x86_64-linux-gnu/libssl.so.3
fl=???
fn=SSL_write
0 300

ob=/usr/lib/x86_64-linux-gnu/libcrypto.so.3
fl=???
fn=EVP_EncryptUpdate
0 600

ob=/usr/lib/x86_64-linux-gnu/libc.so.6
fl=???
fn=memcpy
0 20

totals: 932
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("check")


def test_what_openssl_does_itself_is_left_out_and_nothing_counts_twice(check: ModuleType) -> None:
    assert check.instructions_but_openssl(PROFILE) == 7 + 5 + 20


def test_the_openssl_of_a_wheel_is_known_by_its_name(check: ModuleType) -> None:
    bundled = PROFILE.replace("libssl.so.3", "libssl-1b2c3d4e.so.3")
    assert check.instructions_but_openssl(bundled) == 32


def test_a_profile_that_does_not_add_up_makes_no_figure(check: ModuleType) -> None:
    with pytest.raises(SystemExit, match="not understood"):
        check.instructions_but_openssl(PROFILE.replace("totals: 932", "totals: 1832"))


def test_a_process_that_used_no_openssl_makes_no_figure(check: ModuleType) -> None:
    other = PROFILE.replace("libssl.so.3", "librustls.so.1")
    with pytest.raises(SystemExit, match="what did the TLS"):
        check.instructions_but_openssl(other)
