"""This module checks whether a library's file is as long as its headers say. The system's loader
maps even a truncated file, and the process ends with SIGBUS when the missing part is first used: at
a kernel, long after the import."""

from __future__ import annotations

import os
import struct
from pathlib import Path

_IDENT = b"\x7fELF\x02\x01"  # 64 bits, little-endian
# e_phoff, e_shoff, e_phentsize, e_phnum, e_shentsize, e_shnum
_HEADER = struct.Struct("<32xQQ6xHHHH2x")
_SEGMENT = struct.Struct("<I4xQ16xQ16x")  # p_type, p_offset, p_filesz
_LOAD = 1


def check_whole(path: Path) -> None:
    """Raises if a library's file is cut off. It reads the headers alone, which takes microseconds.
    A file of another kind passes; the loader says what is wrong with it.

    Raises:
        OSError: the file is shorter than the end of its segments, or of its tables of segments and
            sections.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_HEADER.size)
        if len(start) < _HEADER.size:
            raise OSError(f"{path} has {size} bytes, fewer than any library")
        if not start.startswith(_IDENT):
            return
        segments, sections, segment_bytes, segment_count, section_bytes, section_count = (
            _HEADER.unpack(start)
        )
        file.seek(segments)
        table = file.read(segment_bytes * segment_count)
    ends = [segments + segment_bytes * segment_count, sections + section_bytes * section_count]
    for position in range(0, len(table) - _SEGMENT.size + 1, max(segment_bytes, _SEGMENT.size)):
        kind, offset, length = _SEGMENT.unpack_from(table, position)
        if kind == _LOAD:
            ends.append(offset + length)
    if size < max(ends):
        raise OSError(f"{path} has {size} bytes of {max(ends)}: its end is missing")
