"""What L4 is written in: packs of values, and how one of them is found. Pure.

Promises: the same values make the same packs, byte for byte; a pack is known by the hash of its index, and the index
has the hash of each frame, so nothing is read as what it is not; one value is read with two ranges, of the index and of
its frame. A pack is never changed: what comes later stands in another one, whose index names the earlier ones' values,
too, so the newest index finds all of them.

    pack    "llmpack1", u32 big endian: the index's bytes, the index, the frames one after the other
    index   zstd of msgpack: [packs, frames, values], see `Index`
    frame   zstd of values one after the other, without a mark between them
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

import msgspec
import zstandard

from proxy.errors import StorageError

MAGIC = b"llmpack1"
HEAD_BYTES = len(MAGIC) + 4
HASH_BYTES = 16
FRAME_BYTES = 262_144  # of values: what one of them costs to read, and what zstd finds repetitions in
PACK_BYTES = 8_388_608  # of frames, about; a larger value has a pack of its own
_LEVEL = 9  # zstd's: a third smaller than with 1; about 25 ms a megabyte, in the background


Pack: TypeAlias = tuple[bytes, int]  # its id, and where its frames begin


class Frame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`at`: behind its pack's index; `pack`: of `Index.packs`."""

    pack: int
    at: int
    size: int
    hash: bytes


class Index(msgspec.Struct, array_like=True):
    """`packs`: the other ones that it names, which `Frame.pack` counts from 1 on (0: its own), and where their frames
    begin. `values`: by key, which frame, where in it, and how long."""

    packs: list[Pack]
    frames: list[Frame]
    values: dict[bytes, tuple[int, int, int]]

    def pack_of(self, frame: Frame, own: Pack) -> Pack:
        return self.packs[frame.pack - 1] if frame.pack else own


EMPTY = Index([], [], {})
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Index).decode


def build(rows: Iterable[tuple[bytes, bytes]], earlier: Index, own: Pack) -> Iterator[tuple[bytes, bytes]]:
    """(id, pack) of each pack that the rows make; the last one's index has the earlier packs' values, too. `earlier`:
    the index of the newest pack so far, `own`. No rows: no pack."""
    whole = _seen_from_another(earlier, own)
    frames: list[_Made] = []
    packed_bytes = 0
    for some in _framed(rows):
        if packed_bytes >= PACK_BYTES:
            pack, data, index = _packed(frames, EMPTY)
            yield pack[0], data
            whole = _seen_from_another(_joined(index, whole), pack)
            frames, packed_bytes = [], 0
        frames.append(_frame(some))
        packed_bytes += len(frames[-1].data)
    if frames:
        pack, data, _ = _packed(frames, whole)
        yield pack[0], data


class _Made(NamedTuple):
    places: list[tuple[bytes, int, int]]  # key, where in the frame, how long
    data: bytes


def _framed(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    some, size = list[tuple[bytes, bytes]](), 0
    for row in rows:
        some.append(row)
        size += len(row[1])
        if size >= FRAME_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _frame(rows: list[tuple[bytes, bytes]]) -> _Made:
    places, at = list[tuple[bytes, int, int]](), 0
    for key, value in rows:
        places.append((key, at, len(value)))
        at += len(value)
    return _Made(places, zstandard.ZstdCompressor(_LEVEL).compress(b"".join([value for _, value in rows])))


def _packed(frames: list[_Made], whole: Index) -> tuple[Pack, bytes, Index]:
    """A pack whose index has `whole`, too; and the index of its own values."""
    own, at = Index([], [], {}), 0
    for number, (places, data) in enumerate(frames):
        own.frames.append(Frame(0, at, len(data), _hash(data)))
        own.values.update({key: (number, start, size) for key, start, size in places})
        at += len(data)
    index = zstandard.ZstdCompressor(_LEVEL).compress(_encode(_joined(own, whole)))
    head = MAGIC + len(index).to_bytes(4, "big") + index
    return (_hash(index), len(head)), b"".join([head, *(data for _, data in frames)]), own


def _seen_from_another(index: Index, own: Pack) -> Index:
    """The same as the index of another pack says it."""
    if not index.values:
        return EMPTY
    frames = [Frame(frame.pack or len(index.packs) + 1, frame.at, frame.size, frame.hash) for frame in index.frames]
    return Index([*index.packs, own], frames, index.values)


def _joined(own: Index, whole: Index) -> Index:
    """The index of a pack with both; of a key that both have, its own. `own` names no other pack."""
    after = len(own.frames)
    values = {key: (frame + after, at, size) for key, (frame, at, size) in whole.values.items()}
    return Index(whole.packs, [*own.frames, *whole.frames], {**values, **own.values})


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()


# -- reading


def index_end(head: bytes) -> int:
    """Where a pack's index ends, by the pack's first `HEAD_BYTES`. Raises StorageError."""
    if len(head) < HEAD_BYTES or not head.startswith(MAGIC):
        raise StorageError("it is no pack")
    return HEAD_BYTES + int.from_bytes(head[len(MAGIC) : HEAD_BYTES], "big")


def read_index(data: bytes, pack: bytes) -> Index:
    """Of what a pack begins with, up to `index_end`. Raises StorageError for another one."""
    index = data[HEAD_BYTES : index_end(data)]
    if _hash(index) != pack:
        raise StorageError("its index is not what was stored")
    return _decode(zstandard.ZstdDecompressor().decompress(index))


def read_frame(data: bytes, frame: Frame) -> bytes:
    """The values of a frame. Raises StorageError."""
    if _hash(data) != frame.hash:
        raise StorageError("a part of it is not what was stored")
    return zstandard.ZstdDecompressor().decompress(data)


def values_of(pack: bytes, data: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
    """What stands in a whole pack itself: the values by key, and the keys of those that are damaged. Raises
    StorageError where its index is."""
    index, start = read_index(data, pack), index_end(data)
    read: dict[int, bytes] = {}
    for number, frame in enumerate(index.frames):
        if not frame.pack:
            with suppress(StorageError):
                read[number] = read_frame(data[start + frame.at : start + frame.at + frame.size], frame)
    own = {key: place for key, place in index.values.items() if not index.frames[place[0]].pack}
    sound = {key: read[frame][at : at + size] for key, (frame, at, size) in own.items() if frame in read}
    return sound, [key for key in own if key not in sound]
