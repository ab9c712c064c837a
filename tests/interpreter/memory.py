"""Holds the memories, and how tensor maps and matrix descriptors address them."""

import ctypes
import struct

import numpy as np

from interpreter.lanes import U16, U32, U64, widened


class Fault(Exception):
    """Raised for what a GPU would stop at, and for what no kernel should do."""


class GlobalMemory:
    """The host's memory, as far as it was said to be a tensor's."""

    def __init__(self):
        self.ranges: list[tuple[int, int, np.ndarray]] = []

    def add(self, address: int, size: int) -> None:
        if size:
            array = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
            self.ranges.append((address, address + size, array))

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        for begin, end, array in reversed(self.ranges):
            if begin <= address and address + size <= end:
                return array[address - begin : address - begin + size]
        raise Fault(f"{size} bytes at {address:#x} are in no tensor")

    def _rows(self, addresses: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = int(addresses.min()), int(addresses.max()) + width
        return self.bytes_at(low, high - low), (addresses - U64(low)).astype(np.int64)[
            :, None
        ] + np.arange(width)

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray:
        if not addresses.size:
            return np.zeros((0, width), np.uint8)
        try:
            array, where = self._rows(addresses, width)
        except Fault:
            # The address is of several tensors, or out of bounds.
            return np.stack([self.bytes_at(int(address), width) for address in addresses])
        return array[where]

    def store(self, addresses: np.ndarray, rows: np.ndarray) -> None:
        for address, row in zip(addresses, rows, strict=True):
            self.bytes_at(int(address), len(row))[:] = row


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Returns the places of 16-byte pieces among rows of `span` bytes; 0 stands for none."""
    return addresses ^ ((addresses >> 7 & (span // 16 - 1)) << 4) if span else addresses


class TensorMap:
    """A tensor of 16-bit elements as TMA takes it. The layout of the 128 bytes was found by
    encoding tensors, not in a document."""

    def __init__(self, descriptor: bytes):
        words = struct.unpack("<32I", descriptor)
        rank = (words[2] >> 4 & 7) + 1
        self.span = {0: 0, 1: 32, 2: 64, 3: 128}[words[2] >> 13 & 3]
        self.base = words[0] | words[1] << 32
        self.sizes = [word + 1 for word in words[8 : 8 + rank]]
        self.strides = [2] + [
            (words[3 + i] | (words[7] >> 4 * i & 15) << 32) << 4 for i in range(rank - 1)
        ]
        box = [words[13] >> 24, *(words[14] >> 8 * i & 255 for i in range(4))]
        self.box = [size + 1 for size in box[:rank]]

    def elements(self, coordinates: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns which elements of a box lie within the tensor, and their addresses, which may
        wrap around."""
        index = np.indices(self.box[::-1])[::-1]
        inside, address = np.True_, np.full(index[0].shape, self.base, U64)
        for along, begin, size, stride in zip(
            index, coordinates, self.sizes, self.strides, strict=True
        ):
            place = along + begin
            inside = inside & (place >= 0) & (place < size)
            address = address + place.astype(np.int64).view(U64) * U64(stride)
        return inside.reshape(-1), address.reshape(-1)


# The bytes that a swizzle goes over, by the highest three bits of a matrix descriptor.
SPANS = {2: 128, 4: 64, 6: 32}


class SharedMemory:
    """The shared memory of a CTA, at addresses from BASE on. What nobody wrote is NaN."""

    # The system's own part lies before it.
    BASE = 1024

    def __init__(self, size: int):
        self.end = self.BASE + size
        self.bytes = np.full(self.end, 0xFF, np.uint8)

    def _rows(self, addresses: np.ndarray, width: int) -> np.ndarray:
        if addresses.size and (addresses.min() < self.BASE or addresses.max() + width > self.end):
            raise Fault(
                f"shared memory from {addresses.min()} to {addresses.max() + width}, there is "
                f"[{self.BASE}, {self.end})"
            )
        if (addresses % min(width, 16)).any():
            raise Fault(f"{width} bytes of shared memory at an address that is no multiple of them")
        return addresses[:, None] + np.arange(width)

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray:
        return self.bytes[self._rows(addresses, width)]

    def store(self, addresses: np.ndarray, rows: np.ndarray) -> None:
        self.bytes[self._rows(addresses, rows.shape[1])] = rows

    def matrix(self, descriptor: int, rows: int, transposed: bool, dtype: str) -> np.ndarray:
        """Returns [rows, 16] of a tensor cores' operand, in fp32. `transposed` says that rows, not
        the 16 columns, are neighbours in memory."""
        begin, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
        span = SPANS.get(descriptor >> 61 & 7)
        if not span:
            raise Fault(f"a matrix descriptor with an unknown swizzle, {descriptor >> 61 & 7}")
        row, column = np.arange(rows)[:, None], np.arange(16)[None]
        if transposed:
            per_span = span // 2
            address = (
                begin
                + row // per_span * leading
                + column // 8 * stride
                + column % 8 * span
                + row % per_span * 2
            )
        else:
            address = begin + row // 8 * stride + row % 8 * span + column * 2
        words = self.load(swizzled(address, span).reshape(-1), 2).view(U16)
        return widened(words, dtype).reshape(rows, 16)


class TensorMemory:
    """The tensor memory of a Blackwell CTA: 128 lanes of 512 columns of 32 bits. Addresses have the
    lane in their high half."""

    def __init__(self):
        self.cells = np.full((128, 512), 0xFFFFFFFF, U32)
        self.taken = 0  # columns

    def part(self, address: int, lanes: int, columns: int) -> np.ndarray:
        lane, column = address >> 16, address & 0xFFFF
        if lane + lanes > 128 or column + columns > self.taken:
            raise Fault(
                f"tensor memory of {self.taken} columns, asked for {lanes} lanes from {lane} and "
                f"{columns} columns from {column}"
            )
        return self.cells[lane : lane + lanes, column : column + columns]
