"""Compressed bodies: what was encoded comes back, bombs and broken bytes do not."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from proxy.api.http import decoded, encodings, plain_headers
from proxy.errors import ApiError
from tests.cpu import cpu_within

LIMIT = 64 << 20
MIB = 1 << 20


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": lambda data: bytes(brotli.compress(data, quality=4)),
    "zstd": zstandard.ZstdCompressor().compress,
}
EACH = pytest.mark.parametrize("name", ENCODERS)


@given(st.binary(max_size=3000), st.lists(st.sampled_from(sorted(ENCODERS)), min_size=1, max_size=4), st.integers(1, 50))
def test_what_was_encoded_comes_back_however_often(data: bytes, names: list[str], times: int) -> None:
    body = data * times
    sent = body
    for name in names:
        sent = ENCODERS[name](sent)
    assert decoded(sent, names, LIMIT, 100) == body


@given(st.binary(max_size=3000))
def test_raw_deflate_is_deflate_too(data: bytes) -> None:
    sent = raw_deflate(data)
    looks_like_zlib = len(sent) > 1 and sent[0] & 15 == 8 and (sent[0] << 8 | sent[1]) % 31 == 0
    assert looks_like_zlib or decoded(sent, ["deflate"], LIMIT, 100) == data


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_several_members_are_one_body(name: str) -> None:
    encode = ENCODERS[name]
    assert decoded(encode(b"one ") + encode(b"two"), [name], LIMIT, 100) == b"one two"


@EACH
def test_a_long_body_comes_back_whole(name: str) -> None:
    body = b"".join(b"%d plank " % i for i in range(200_000))
    assert decoded(ENCODERS[name](body), [name], LIMIT, 100) == body


@EACH
@given(cut=st.floats(0, 0.99), noise=st.binary(min_size=1, max_size=20))
def test_broken_bytes_are_nobodys(name: str, cut: float, noise: bytes) -> None:
    whole = ENCODERS[name](b"some words of a message " * 40)
    part = whole[: max(1, int(len(whole) * cut))]
    assert decoded(part, [name], LIMIT, 100) is None
    assert decoded(b"\xff\xfe" + noise, [name], LIMIT, 100) is None


def test_an_encoding_that_nobody_knows_is_upstreams() -> None:
    assert decoded(b"x", ["snappy"], LIMIT, 100) is None
    assert decoded(gzip.compress(b"x"), ["snappy", "gzip"], LIMIT, 100) is None
    assert decoded(b"x", ["gzip"] * 5, LIMIT, 100) is None


@pytest.mark.parametrize("name", ["gzip", "deflate", "br", "zstd"])
def test_a_bomb_is_refused_before_it_is_in_ram(name: str) -> None:
    bomb = ENCODERS[name](bytes(48 * MIB))
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as refused:
            decoded(bomb, [name], LIMIT, 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.status == 413 and refused.value.code == "request_too_large"
    assert peak < 24 * MIB


def test_a_bomb_in_a_bomb_is_refused() -> None:
    with pytest.raises(ApiError):
        decoded(gzip.compress(gzip.compress(bytes(24 * MIB))), ["gzip", "gzip"], LIMIT, 10)


def test_a_body_over_the_limit_is_refused_whatever_its_ratio() -> None:
    with pytest.raises(ApiError):
        decoded(gzip.compress(bytes(2000)), ["gzip"], 1999, 1000)
    assert decoded(gzip.compress(bytes(2000)), ["gzip"], 2000, 1) == bytes(2000)


def test_the_headers_name_the_encodings_in_their_order() -> None:
    headers = [(b"content-encoding", b"GZIP, identity"), (b"a", b"b"), (b"content-encoding", b" br"), (b"content-length", b"5")]
    assert encodings(headers) == ["gzip", "br"]
    assert encodings([(b"content-encoding", b"identity"), (b"content-encoding", b"")]) == []
    assert plain_headers(headers) == [(b"a", b"b")]


def test_invariant_10_members_that_say_nothing_cost_nothing() -> None:
    empty = {"gzip": gzip.compress(b""), "zstd": zstandard.compress(b"")}
    for name, member in empty.items():
        with cpu_within(1, name):  # measured 0.02; gzip's took 100
            assert decoded(member * 500_000, [name], 1 << 26, 200) is None, name
        assert decoded(member * 100 + ENCODERS[name](b"the end"), [name], 1 << 26, 200) == b"the end"


def test_a_long_body_that_repeats_nothing_is_read_in_linear_time() -> None:
    body = os.urandom(16 << 20)
    encoded = gzip.compress(body, 1)
    with cpu_within(0.2):  # measured 0.02; with the rest copied for each piece, 0.3
        assert decoded(encoded, ["gzip"], 1 << 26, 200) == body
