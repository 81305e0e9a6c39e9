"""The texts in a picture's file, read and written beside its pixels: PNG's chunks, EXIF where a format has none.

A picture may come from anybody: its texts are read under a cap, and its pixels are not decoded.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

from ...errors import CorruptError
from .reading import existing_file

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

JSON_KEY = "fewstep"
"""The call as fewstep's own JSON, from which the picture is made again."""
TEXT_KEY = "parameters"
"""The same as the web UI of A1111 writes it."""
PROMPT_KEY = "prompt"
"""The same as a prompt of ComfyUI's."""
KEYS = (JSON_KEY, TEXT_KEY, PROMPT_KEY)
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_TEXT = 4 << 20
"""Bytes of a text, unpacked."""
MOST_CHUNKS = 100_000
MOST_EXIF = 65_000
"""Bytes of EXIF that a JPEG's segment takes."""
EXIF_FORMATS = ("JPEG", "WEBP", "AVIF")
EXIF_FOLDER, MAKER_NOTE, USER_COMMENT = 0x8769, 0x927C, 0x9286
_UTF_16 = b"UNICODE\0"
_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(struct.error, zlib.error, UserWarning),
)


def read_texts(path: str | os.PathLike[str]) -> tuple[str, dict[str, Sequence[str]]]:
    """A picture's name, and of the texts that `KEYS` names what it holds, each as often as it is there.

    `CorruptError` for a file that is no PNG, JPEG, WebP or AVIF, or a damaged one.
    """
    file = existing_file(path)
    texts: defaultdict[str, list[str]] = defaultdict(list)
    try:
        with file.open("rb") as stream:
            begin = stream.read(8)
            for key, text in _of_png(stream) if begin == SIGNATURE else _of_exif(stream):
                texts[key].append(text)
    except _UNREADABLE as error:
        raise CorruptError(
            f"{file.name} cannot be read as a picture that says how it was made ({error})",
            expected="a whole PNG, JPEG, WebP or AVIF file",
        ) from error
    return file.name, dict(texts)


def png_texts(texts: Mapping[str, str]) -> PngInfo:
    """The texts as chunks of a PNG."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    return info


def exif_of(texts: Mapping[str, str]) -> bytes:
    """The texts as EXIF: A1111's as its user comment, in UTF-16 as there, and fewstep's JSON as its maker note.

    JSON that a JPEG has no room for is left out; so is ComfyUI's prompt, which it reads in PNGs alone.
    """
    entries = [(USER_COMMENT, _UTF_16 + texts[TEXT_KEY].encode("utf-16-be", "replace"))] if TEXT_KEY in texts else []
    if JSON_KEY in texts:
        entries.insert(0, (MAKER_NOTE, JSON_KEY.encode() + b"\0" + texts[JSON_KEY].encode()))
    while entries and sum(len(data) for _, data in entries) > MOST_EXIF:
        entries.pop(0)
    begin, folder = 26, 2 + 12 * len(entries) + 4
    head = b"MM\0*" + struct.pack(">IHHHIII", 8, 1, EXIF_FOLDER, 4, 1, begin, 0)
    table, data = struct.pack(">H", len(entries)), b""
    for tag, content in entries:
        inline = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack(">I", begin + folder + len(data))
        table += struct.pack(">HHI", tag, 7, len(content)) + inline
        data += content + bytes(len(content) % 2) if len(content) > 4 else b""
    return b"Exif\0\0" + head + table + bytes(4) + data


def _of_exif(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    from PIL import Image as pillow

    stream.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Pillow warns of damaged EXIF and goes on
        with pillow.open(stream, formats=EXIF_FORMATS) as image:
            entries = image.getexif().get_ifd(EXIF_FOLDER)
    note, comment = entries.get(MAKER_NOTE, b""), entries.get(USER_COMMENT, b"")
    if not isinstance(note, bytes) or not isinstance(comment, bytes) or max(len(note), len(comment)) > MOST_TEXT:
        raise ValueError("its EXIF holds no texts of bytes")
    if note.startswith(JSON_KEY.encode() + b"\0"):
        yield JSON_KEY, note[len(JSON_KEY) + 1 :].decode()
    if comment.startswith(_UTF_16):
        yield TEXT_KEY, comment[len(_UTF_16) :].decode("utf-16-be")
    elif comment.startswith(b"ASCII\0\0\0"):
        yield TEXT_KEY, comment[8:].decode("latin-1")


def _of_png(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    for kind, data in _text_chunks(stream):
        key = data.partition(b"\0")[0].decode("latin-1")
        if key in KEYS:
            yield key, _text(kind, data)


def _text_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """The kinds and contents of a PNG's text chunks, to its end; all others are passed over."""
    for _ in range(MOST_CHUNKS):
        length, kind = struct.unpack(">I4s", stream.read(8))
        if kind in (b"tEXt", b"zTXt", b"iTXt") and length <= MOST_TEXT:
            data = stream.read(length)
            if struct.unpack(">I", stream.read(4))[0] != zlib.crc32(data, zlib.crc32(kind)):
                raise ValueError("a text chunk is damaged")
            yield kind, data
        else:
            stream.seek(length + 4, os.SEEK_CUR)
        if kind == b"IEND":
            return
    raise ValueError(f"more than {MOST_CHUNKS} chunks")


def _text(kind: bytes, data: bytes) -> str:
    """The text of a chunk."""
    rest = data.partition(b"\0")[2]
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        _, _, rest = rest[2:].partition(b"\0")  # the language
        _, _, rest = rest.partition(b"\0")  # the key, translated
    if packed:
        unpacking = zlib.decompressobj()
        rest = unpacking.decompress(rest, MOST_TEXT)
        if not unpacking.eof:
            raise ValueError(f"a text of more than {MOST_TEXT} bytes, or a damaged one")
    return rest.decode("utf-8" if kind == b"iTXt" else "latin-1")
