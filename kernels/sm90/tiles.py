"""Which query tiles a CTA of the persistent forward works on, and in what order.

This is integer arithmetic for the kernel and for tests without a GPU: `choose(condition, a, b)` is
the caller's conditional, and divisors are what `divmod` takes. "Heads" are those of all batch
elements, and `count` is the number of a head's query tiles. A CTA's place is (cursor, flip).

Without a causal mask all tiles cost the same. They stand in a line head by head, so that
neighbouring CTAs read the same keys, and the CTAs take them in alternating direction.

Under a causal mask a head's last tile costs most. The first `paired_heads` heads are scheduled in
units of the same cost, a costly tile and a cheap one of one head. Few heads are in work at a time,
so their keys stay in L2. The other heads' tiles follow in LPT order (longest processing time
first), in alternating direction over the CTAs, so that their loads are about equal. The planner's
tile schedule (csrc/core/plan/tile_schedule.cpp) chooses `paired_heads`.

Packed sequences come in groups of as many as a warp has lanes, a lane for each. Most heads of a
group follow head by head, and in a head sequence by sequence, so that few keys are read at a time
and stay in L2. The last heads' tiles follow by LPT, level by level. A tile's level is about the
number of its key blocks.
"""

# Tiles in the ring of a CTA: short ones are found ahead, so that the loads of several are on their
# way.
RING = 4
HIGHEST = 1 << 30  # above all levels
# Waves of tiles of the heads that follow by LPT. Computed for random lengths: 4 leave up to 15% of
# the CTAs' time idle, 6 up to 3%; more heads at a time were measured to miss L2.
LAST_WAVES = 6


def units(count):
    """The number of a head's units. With an odd number of tiles the costliest is a unit by
    itself."""
    return (count + 1) // 2


def first(cta):
    """A CTA's first place."""
    return cta, 0


def following(cursor, flip, cta, num_ctas, paired_heads, count, units_divisor, choose):
    """A CTA's next place."""
    limit = paired_heads * units(count)
    _, unit = divmod(cursor, units_divisor)
    second = choose(flip == 0, choose(count % 2 == 0, 1, choose(unit == 0, 0, 1)), 0)
    other = choose(flip == 0, 2 * (num_ctas - 1 - cta) + 1, 2 * cta + 1)
    # Waves up to the end of the pairs go forward, from the first CTA to the last. In the last of
    # these waves the CTAs without a pair begin the unpaired tiles, with the costliest ones.
    forth = cursor - cta < limit
    step = choose(forth, choose(cursor < limit, choose(second == 1, 0, num_ctas), num_ctas), other)
    return cursor + step, choose(forth, choose(cursor < limit, second, 0), 1 - flip)


def end(heads, paired_heads, count):
    """The first cursor at which there is no tile."""
    return paired_heads * units(count) + (heads - paired_heads) * count


def causal(cursor, flip, paired_heads, count, units_divisor, rest_divisor, choose):
    """The head and the query tile at a place under a causal mask. `rest_divisor` divides by the
    number of heads that are not paired."""
    limit = paired_heads * units(count)
    head, unit = divmod(cursor, units_divisor)
    odd = count % 2
    tile = choose(flip == 0, count - 1 - unit, unit - odd)
    row, other = divmod(choose(cursor < limit, 0, cursor - limit), rest_divisor)
    return choose(cursor < limit, head, paired_heads + other), choose(
        cursor < limit, tile, count - 1 - row
    )


def full(cursor, count_divisor):
    """The head and the query tile at a cursor without a causal mask."""
    return divmod(cursor, count_divisor)


def levels(count, rows, keys, tile_m, causal, choose):
    """The lowest and the highest level of a sequence with this many query tiles, and the number of
    its tiles at each.

    Under a causal mask there is one tile at each level, the last query tile at the highest. Without
    one all tiles are at one level.
    """
    if causal:
        low = choose(keys > rows, keys - rows, 0) // tile_m
        return low, choose(count > 0, low + count - 1, -1), 1
    level = keys // tile_m
    return level, choose(count > 0, level, -1), count


def next_level(level, low, high, largest, choose):
    """The highest level below `level` that any sequence has tiles at, or -1."""
    return largest(choose(low < level, choose(high < level, high, level - 1), -1))


def at_level(level, low, high, each, choose):
    """The number of a sequence's tiles at a level."""
    return choose(low <= level, choose(level <= high, each, 0), 0)


def last_heads(heads_kv, tiles_a_head, num_ctas, choose):
    """The number of key/value heads whose tiles of a group follow by LPT. `tiles_a_head` are those
    of a key/value head."""
    tiles_a_head = choose(tiles_a_head > 0, tiles_a_head, 1)
    heads = (LAST_WAVES * num_ctas + tiles_a_head - 1) // tiles_a_head
    return choose(heads < heads_kv, heads, heads_kv)
