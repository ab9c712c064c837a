"""Reads what the device code inside an object needs from the ELF that the compiler embedded, not
from what was asked for."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

EM_CUDA = 190
FATBIN_MAGIC = 0xBA55ED50
FATBIN_ELF = 2  # kind of an entry
# opcodes; WARPGROUP.DEPBAR has bit 47 set, WARPGROUP.ARRIVE not
HGMMA, HGMMA_RS, WARPGROUP = 0x9F0, 0xDF0, 0x9C5
# the system's own part of a CTA's shared memory, which cuobjdump counts as the kernel's
RESERVED_SHARED_BYTES = 1024


@dataclass(frozen=True)
class Resources:
    arch: int  # 90 or 100
    registers: int  # a thread
    spill_bytes: int  # local memory a thread: stack frame and spills
    static_shared_bytes: int
    products: int  # WGMMA instructions
    waits: int  # for all those issued so far, or all but the newest group


@dataclass(frozen=True)
class Symbol:
    name: str
    defined: bool
    data: bytes


def _section_headers(elf: bytes) -> list[tuple]:
    """The section headers of a 64-bit little-endian ELF object."""
    (section_offset,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count = struct.unpack_from("<HH", elf, 0x3A)
    return [
        struct.unpack_from("<IIQQQQIIQQ", elf, section_offset + i * entry_size)
        for i in range(count)
    ]


def _sections(elf: bytes, prefix: str) -> list[bytes]:
    sections = _section_headers(elf)
    (names_index,) = struct.unpack_from("<H", elf, 0x3E)
    names = sections[names_index][4]
    return [
        elf[s[4] : s[4] + s[5]] for s in sections if elf.startswith(prefix.encode(), names + s[0])
    ]


def symbols(elf: bytes) -> list[Symbol]:
    """The symbol table of a 64-bit little-endian ELF object."""
    sections = _section_headers(elf)
    table = next(section for section in sections if section[1] == 2)  # SHT_SYMTAB
    names = sections[table[6]][4]
    found = []
    for offset in range(table[4], table[4] + table[5], 24):
        name, _, _, index, value, size = struct.unpack_from("<IBBHQQ", elf, offset)
        text = elf[names + name : elf.index(b"\0", names + name)].decode()
        in_file = 0 < index < len(sections) and sections[index][1] == 1  # SHT_PROGBITS
        start = sections[index][4] + value if in_file else 0
        found.append(Symbol(text, index != 0, elf[start : start + size] if in_file else b""))
    return found


def undefined(elf: bytes) -> list[str]:
    return [symbol.name for symbol in symbols(elf) if symbol.name and not symbol.defined]


def extract(elf: bytes) -> bytes:
    """The cubin in the fat binary of one entry that export_to_c embeds as `kernels_binary`."""
    found = [symbol.data for symbol in symbols(elf) if symbol.name == "kernels_binary"]
    if len(found) != 1:
        raise ValueError(f"object holds {len(found)} symbols kernels_binary, expected 1")
    data = found[0]
    return in_fat_binary(lambda begin, size: data[begin : begin + size])


def in_fat_binary(read: Callable[[int, int], bytes]) -> bytes:
    """The one cubin of a fat binary; `read` takes a place in it and a size."""
    magic, header_bytes, content_bytes = struct.unpack("<IxxHQ", read(0, 16))
    kind, entry_header_bytes, cubin_bytes = struct.unpack("<HxxIQ", read(header_bytes, 16))
    if (magic, kind, entry_header_bytes + cubin_bytes) != (FATBIN_MAGIC, FATBIN_ELF, content_bytes):
        raise ValueError("kernels_binary is not a fat binary of one uncompressed cubin")
    return read(header_bytes + entry_header_bytes, cubin_bytes)


def _run(tool: str, *options: str, cubin: bytes) -> str:
    """Runs a tool of the PyPI packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    nvidia = find_spec("nvidia")
    roots = (nvidia and nvidia.submodule_search_locations) or ()
    path = next(
        (path for root in roots if (path := Path(root, "cu13", "bin", tool)).exists()),  # type: ignore[union-attr]
        None,
    )
    if path is None:
        raise FileNotFoundError(f"{tool} is not installed: pip install nvidia-cuda-{tool}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run(
            [path, *options, file.name], capture_output=True, text=True, check=False
        )
    if result.returncode:
        raise RuntimeError(f"{tool} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def disassemble(cubin: bytes) -> str:
    return _run("nvdisasm", cubin=cubin)


def arch(cubin: bytes) -> int:
    machine, _, _, _, _, flags = struct.unpack_from("<HIQQQI", cubin, 0x12)
    if machine != EM_CUDA:
        raise ValueError(f"embedded ELF is for machine {machine}, expected {EM_CUDA} (CUDA)")
    return flags >> 8 & 0xFF


def resources(cubin: bytes) -> Resources:
    usage = re.findall(
        r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        _run("cuobjdump", "-res-usage", cubin=cubin),
    )
    if len(usage) != 1:
        raise ValueError(f"device code holds {len(usage)} kernels, expected 1")
    registers, stack, shared, local = map(int, usage[0])
    return Resources(arch(cubin), registers, stack + local, shared, *_products_and_waits(cubin))


def _products_and_waits(cubin: bytes) -> tuple[int, int]:
    """Counts WGMMA instructions and the waits for them, by the low bits of Hopper's instructions as
    nvdisasm decodes them. Other architectures have none."""
    if arch(cubin) != 90:
        return 0, 0
    products = waits = 0
    for code in _sections(cubin, ".text."):
        for low, _ in struct.iter_unpack("<QQ", code):
            products += low & 0xFFF in (HGMMA, HGMMA_RS)
            waits += low & 0xFFF == WARPGROUP and low >> 47 & 1
    return products, waits
