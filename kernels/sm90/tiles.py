"""Which tiles a CTA of the persistent forward works on, and in what order.

Integer arithmetic for the kernel and for tests without a GPU: `choose(condition, a, b)` is the
caller's conditional, and divisors are what `divmod` takes. "Heads" are those of all batch elements.
A cta, which is a CTA, is at (cursor, flip).

Without a causal mask all tiles cost the same. They stand in a line head by head, so that neighbours
read the same keys, and are dealt out to the num_ctas in turns.

Under a causal mask the last block of queries is the longest. The first heads, `paired_heads` of them, are
dealt out in units of the same cost, a long block and a short one of one head; few heads are in work
at a time, so their keys stay in L2. The other heads' blocks follow longest first, dealt out to and
fro, which leaves all num_ctas with equal loads. csrc/core/persistent.cpp chooses `paired_heads`.

Packed sequences come in groups of as many as a warp has lanes, a lane for each. Most heads of a
group follow head by head and in it sequence by sequence, so that few keys are read at a time and
stay in L2. The last heads' tiles follow longest first, level by level: a level is a number of
blocks of keys, about.
"""

# Tiles in the ring of a CTA: short ones are found ahead, so that the loads of several are on their
# way.
RING = 4
HIGHEST = 1 << 30  # above all levels
# Tiles a cta, of the heads that follow longest first. Computed for random lengths: 4 leave up to
# 15% of the num_ctas' time idle, 6 up to 3%; more heads at a time were measured to miss L2.
LAST_WAVES = 6


def units(blocks):
    """Of a head. With an odd number of blocks the longest is a unit by itself."""
    return (blocks + 1) // 2


def first(cta):
    return cta, 0


def following(cursor, flip, cta, num_ctas, paired_heads, blocks, units_divisor, choose):
    """The cta's next place."""
    limit = paired_heads * units(blocks)
    _, unit = divmod(cursor, units_divisor)
    second = choose(flip == 0, choose(blocks % 2 == 0, 1, choose(unit == 0, 0, 1)), 0)
    other = choose(flip == 0, 2 * (num_ctas - 1 - cta) + 1, 2 * cta + 1)
    # In these rounds the first cta comes first. The last of them ends the pairs: who had one
    # less begins with a longest block.
    forth = cursor - cta < limit
    step = choose(forth, choose(cursor < limit, choose(second == 1, 0, num_ctas), num_ctas), other)
    return cursor + step, choose(forth, choose(cursor < limit, second, 0), 1 - flip)


def end(heads, paired_heads, blocks):
    """The first cursor at which there is no tile."""
    return paired_heads * units(blocks) + (heads - paired_heads) * blocks


def causal(cursor, flip, paired_heads, blocks, units_divisor, rest_divisor, choose):
    """Head and block of queries; `rest_divisor`: of the heads that are not paired_heads."""
    limit = paired_heads * units(blocks)
    head, unit = divmod(cursor, units_divisor)
    odd = blocks % 2
    block = choose(flip == 0, blocks - 1 - unit, unit - odd)
    row, other = divmod(choose(cursor < limit, 0, cursor - limit), rest_divisor)
    return choose(cursor < limit, head, paired_heads + other), choose(
        cursor < limit, block, blocks - 1 - row
    )


def full(cursor, blocks_divisor):
    """Head and block of queries."""
    return divmod(cursor, blocks_divisor)


def levels(blocks, rows, keys, tile_m, causal, choose):
    """Of a sequence with this many blocks of queries: its lowest level, its highest, and its tiles
    at each.

    Under a causal mask one tile at each of them, the last block of queries at the highest; without
    one all tiles at one level.
    """
    if causal:
        low = choose(keys > rows, keys - rows, 0) // tile_m
        return low, choose(blocks > 0, low + blocks - 1, -1), 1
    level = keys // tile_m
    return level, choose(blocks > 0, level, -1), blocks


def next_level(level, low, high, largest, choose):
    """The highest below `level` that any sequence has tiles at; -1: none."""
    return largest(choose(low < level, choose(high < level, high, level - 1), -1))


def at_level(level, low, high, each, choose):
    return choose(low <= level, choose(level <= high, each, 0), 0)


def last_heads(heads_kv, tiles_a_head, num_ctas, choose):
    """How many key/value heads' tiles of a group follow longest first; `tiles_a_head`: a key/value
    head's."""
    tiles_a_head = choose(tiles_a_head > 0, tiles_a_head, 1)
    heads = (LAST_WAVES * num_ctas + tiles_a_head - 1) // tiles_a_head
    return choose(heads < heads_kv, heads, heads_kv)
