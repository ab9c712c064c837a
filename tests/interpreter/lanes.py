"""Defines the arithmetic of a warp's 32 lanes. A register is an array of 32 unsigned integers,
whatever type an instruction takes it for."""

import numpy as np

LANES = 32
LANE = np.arange(LANES)
U16, U32, U64 = np.uint16, np.uint32, np.uint64


def full(value: int, dtype) -> np.ndarray:
    return np.full(LANES, value, dtype)


def floats(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(U32)


def halves(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds fp32 to nearest even, as 16 bits of bf16 or f16."""
    if dtype == "f16":
        return values.astype(np.float16).view(U16)
    words = np.ascontiguousarray(values, np.float32).view(U32)
    rounded = ((words + ((words >> 16) & 1) + U32(0x7FFF)) >> 16).astype(U16)
    return np.where(np.isnan(values), U16(0x7FFF), rounded)


def widened(words: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "f16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(U32) << 16).view(np.float32)


def matrix_of_warp(registers: list[np.ndarray], dtype: str, rows: int = 16) -> np.ndarray:
    """The operand [rows, 16] of a warp's product, whose pairs of elements lie in registers."""
    matrix, blocks = np.zeros((rows, 16), np.float32), rows // 8
    for i, value in enumerate(registers):
        row, column = LANE // 4 + 8 * (i % blocks), 2 * (LANE % 4) + 8 * (i // blocks)
        matrix[row, column] = widened((value & U32(0xFFFF)).astype(U16), dtype)
        matrix[row, column + 1] = widened((value >> U32(16)).astype(U16), dtype)
    return matrix


def packed(high: np.ndarray, low: np.ndarray, dtype: str) -> np.ndarray:
    return halves(floats(high), dtype).astype(U32) << 16 | halves(floats(low), dtype)


def integers(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns a register's low bits as the integers of a PTX type: u8 to s64."""
    signed, size = kind[0] == "s", int(kind[1:])
    dtype = np.dtype(f"{'i' if signed else 'u'}{size // 8}")
    return values.astype(np.dtype(f"u{size // 8}")).view(dtype)


def converted(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Applies cvt to the bits of a register."""
    if source in ("bf16", "f16"):
        return bits(widened(values, source))
    if target == "f32":
        return bits(integers(values, source).astype(np.float32))
    # It rounds towards zero; a NaN becomes 0.
    if source == "f32":
        limits = np.iinfo(integers(values, target).dtype)
        whole = np.nan_to_num(np.trunc(floats(values).astype(np.float64)), nan=0.0)
        return np.clip(whole, limits.min, limits.max).astype(np.int64).view(U64).astype(U32)
    kind, source = target.replace("b", "u"), source.replace("b", "u")
    result = integers(integers(values, source).astype(np.int64).view(U64), kind)
    register = max(result.dtype.itemsize, 2)
    return result.astype(np.dtype(f"{result.dtype.kind}{register}")).view(np.dtype(f"u{register}"))


def pairs(operation: str, rounding: str, *operands: np.ndarray) -> np.ndarray:
    """Applies add, sub, mul or fma to two fp32 in 64 bits. `rounding` is rn, or rm towards minus
    infinity."""
    a, b, *c = (np.ascontiguousarray(x).view(np.float32).astype(np.float64) for x in operands)
    exact = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "fma": lambda: a * b + c[0],
    }[operation]()
    rounded = exact.astype(np.float32)
    if rounding == "rm":
        rounded = np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return rounded.astype(np.float32).view(U64)


def divided(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """Divides towards zero. What a division by zero gives is nobody's business."""
    x, y = (
        integers(a, kind).astype(object),
        integers(np.where(b == 0, 1, b).astype(b.dtype), kind).astype(object),
    )
    quotients = [
        abs(i) // abs(j) * (1 if (i < 0) == (j < 0) else -1) for i, j in zip(x, y, strict=True)
    ]
    return np.array([quotient % 2 ** (8 * a.itemsize) for quotient in quotients], a.dtype)


def high_half(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    wide = integers(a, kind).astype(object) * integers(b, kind).astype(object)
    return np.array([(int(value) >> 32) % 2**32 for value in wide], U32)


def wide_product(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    size = 2 * int(kind[1:])
    product = integers(a, kind).astype(np.int64) * integers(b, kind).astype(np.int64)
    return product.view(U64).astype(np.dtype(f"u{size // 8}"))


def shifted_left(values: np.ndarray, by: np.ndarray, kind: str) -> np.ndarray:
    size = int(kind[1:])
    moved = np.left_shift(values, np.minimum(by, size - 1).astype(values.dtype))
    return np.where(by < size, moved, values.dtype.type(0))


def shifted_right(values: np.ndarray, by: np.ndarray, kind: str) -> np.ndarray:
    size = int(kind[1:])
    if kind[0] == "s":
        signed = integers(values, kind)
        return np.right_shift(signed, np.minimum(by, size - 1).astype(signed.dtype)).view(
            values.dtype
        )
    moved = np.right_shift(values, np.minimum(by, size - 1).astype(values.dtype))
    return np.where(by < size, moved, values.dtype.type(0))


def shuffled(
    values: np.ndarray, by: np.ndarray, clamp: np.ndarray, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of other lanes, and whether each lane's source is in its segment. The lane
    that it reads must be active."""
    segment = int(clamp[0]) >> 8 & 31
    last = (LANE & segment) | (int(clamp[0]) & 31 & ~segment)
    by = (by & U32(31)).astype(int)
    source = {
        "idx": (LANE & segment) | (by & ~segment & 31),
        "bfly": LANE ^ by,
        "up": LANE - by,
        "down": LANE + by,
    }[mode]
    inside = source >= (LANE & segment) if mode == "up" else source <= last
    source = np.where(inside, source, LANE)
    return values[source], inside, source


def mask_bits(lanes: np.ndarray) -> int:
    return int((lanes.astype(np.int64) << LANE).sum())
