"""Warps, thread blocks and a grid of them, in an order drawn at random."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from interpreter.lanes import (
    LANE,
    LANES,
    U16,
    U32,
    U64,
    bits,
    floats,
    full,
    integers,
    matrix_of_warp,
    widened,
)
from interpreter.memory import Fault, GlobalMemory, SharedMemory, TensorMap, TensorMemory, swizzled
from interpreter.program import Program

# addresses of shared memory have the rank of their thread block in the cluster above
RANK_SHIFT = 24
POLLS = 4  # runs of instructions of a loop that waits
WARPGROUP = 4  # warps


@dataclass(frozen=True)
class Launch:
    program: Program
    parameters: np.ndarray  # bytes, as Program.parameters places them
    grid: tuple[int, int, int]
    threads: int  # a thread block
    cluster: int  # thread blocks
    shared_bytes: int  # a thread block
    memory: GlobalMemory
    seed: int
    # products, and stores by copies or to tensor memory, happen as late as they may, or else at
    # once
    lazy: bool


@dataclass
class Barrier:
    """mbarrier"""

    count: int
    missing: int = 0  # arrivals
    bytes: int = 0  # expected and not there yet
    phase: int = 0

    def __post_init__(self):
        self.missing = self.count

    def arrive(self, count: int, bytes_expected: int) -> None:
        self.missing -= count
        self.bytes += bytes_expected
        if self.missing < 0:
            raise Fault("an mbarrier has more arrivals than it counts")
        self.settle()

    def settle(self) -> None:
        if not self.missing and not self.bytes:
            self.missing, self.phase = self.count, self.phase + 1


@dataclass
class NamedBarriers:
    """bar.sync and bar.arrive; the cluster's barrier is one, too."""

    missing: dict = field(default_factory=dict)
    expected: dict = field(default_factory=dict)
    phase: dict = field(default_factory=dict)
    votes: dict = field(default_factory=dict)  # whether a thread of the running phase said yes
    result: dict = field(default_factory=dict)  # of the last phase

    def arrive(self, which, threads: int, vote: bool = False) -> None:
        if which not in self.missing:
            self.missing[which] = self.expected[which] = threads
        if self.expected[which] != threads:
            raise Fault(f"barrier {which} is for {self.expected[which]} threads and for {threads}")
        self.missing[which] -= LANES
        self.votes[which] = self.votes.get(which, False) or vote
        if not self.missing[which]:
            del self.missing[which]
            self.result[which] = self.votes.pop(which)
            self.phase[which] = self.phase.get(which, 0) + 1


@dataclass(frozen=True)
class Product:
    target: list[int]  # registers
    a: list[np.ndarray] | int  # registers' values, or a descriptor
    b: int
    keep: bool
    transposed: tuple[int, int]
    columns: int
    dtype: str


class Warp:
    def __init__(self, block: "ThreadBlock", index: int):
        self.block, self.shared, self.index = block, block.shared, index
        self.registers = list(block.launch.program.unwritten)
        self.at, self.places = 0, None  # the next instruction, or where lanes differ, each lane's
        self.done = False
        self.waiting: str | None = None  # for what, when the last step did not get on
        self.steps_since_waiting = 0
        self.open_products: list[Product] = []
        self.products: list[list[Product]] = []
        self.open_stores, self.stores = [], []
        self.open_loads, self.loads = [], []
        # each a part of tensor memory, and its columns
        self.tensor_stores: list[tuple[np.ndarray, list[np.ndarray]]] = []
        self.arrived: int | None = None  # the phase of the barrier that it waits at
        self.cluster_phase = 0

    def step(self) -> None:
        """A run of instructions of the lanes that are furthest behind."""
        self.waiting = None
        mask = None
        if self.places is not None:
            self.at = int(self.places.min())
            mask = self.places == self.at
            if mask.all():
                self.places = mask = None
        after = self.block.launch.program.blocks[self.at](self, self.registers, mask)
        self.steps_since_waiting = 0 if self.waiting else self.steps_since_waiting + 1
        if after is None or self.done:
            return
        if mask is None:
            self.at = after
        else:
            self.places = np.where(mask, after, self.places)

    def branch(self, condition, mask, target: int, after: int) -> int | None:
        if mask is None and condition.all():
            return target
        if mask is None and not condition.any():
            return after
        places = np.where(condition, target, after)
        self.places = places if mask is None else np.where(mask, places, self.places)
        return None

    def ends(self, mask) -> None:
        if mask is not None:
            raise Fault("some lanes of a warp end before others")
        self.commit_stores()  # those without a commit happen, too, if nobody knows when
        self.await_stores(0)
        if (
            self.products
            or self.open_products
            or self.loads
            or self.open_loads
            or self.tensor_stores
        ):
            raise Fault("a warp ends with products or copies under way")
        self.done = True

    def special(self, name: str) -> np.ndarray:
        block, launch = self.block, self.block.launch
        if name == "%laneid":
            return LANE.astype(U32)
        if name == "%tid.x":
            return (LANE + LANES * self.index).astype(U32)
        place = {"x": 0, "y": 1, "z": 2}.get(name[-1], 0)
        cluster = 1 if place else launch.cluster
        value = {
            "%tid": 0, "%ntid": launch.threads if not place else 1, "%ctaid": block.place[place],
            "%nctaid": launch.grid[place],
            "%cluster_ctarank": block.rank, "%cluster_nctarank": launch.cluster,
            "%cluster_ctaid": 0 if place else block.rank,
            "%cluster_nctaid": cluster, "%clusterid": block.place[place] // cluster,
            "%nclusterid": launch.grid[place] // cluster,
        }[name.split(".")[0]]  # fmt: skip
        return full(value, U32)

    @staticmethod
    def active(values: np.ndarray, mask) -> np.ndarray:
        return values if mask is None else values[mask]

    def all_lanes(self, mask, what: str) -> None:
        if mask is not None:
            raise Fault(f"{what} by a part of a warp")

    def check_active(self, lanes: np.ndarray, mask) -> None:
        if mask is not None and not mask[lanes[mask]].all():
            raise Fault("a shuffle from a lane that is not there")

    # Memory

    @staticmethod
    def register(rows: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(rows)
        if rows.shape[1] == 1:
            return rows[:, 0].astype(U16)
        return rows.view({2: U16, 4: U32, 8: U64}[rows.shape[1]])[:, 0].copy()

    @staticmethod
    def bytes_of(values: np.ndarray, size: int) -> np.ndarray:
        return np.ascontiguousarray(values).view(np.uint8).reshape(LANES, -1)[:, :size]

    def spread(self, rows: np.ndarray, mask) -> np.ndarray:
        if mask is None:
            return rows
        every = np.zeros((LANES, rows.shape[1]), np.uint8)
        every[mask] = rows
        return every

    def load_shared(self, addresses, width: int, mask) -> np.ndarray:
        addresses = self.active(addresses, mask)
        rows = np.zeros((len(addresses), width), np.uint8)
        for rank in np.unique(addresses >> RANK_SHIFT):
            there = addresses >> RANK_SHIFT == rank
            rows[there] = self.peer(rank).shared.load(
                addresses[there] - (rank << RANK_SHIFT), width
            )
        return self.spread(rows, mask)

    def store_shared(self, addresses, rows, mask) -> None:
        self.shared.store(self.own(self.active(addresses, mask)), self.active(rows, mask))

    def peer(self, rank: int) -> "ThreadBlock":
        """A thread block of the cluster, to reach into its shared memory."""
        if self.block.peers[rank].ended:
            raise Fault("shared memory of a thread block that has ended")
        return self.block.peers[rank]

    def own(self, addresses):
        """Within the thread block's shared memory, of which they must be."""
        if np.any(np.asarray(addresses) >> RANK_SHIFT != self.block.rank):
            raise Fault("an address of another thread block's shared memory")
        return addresses - (self.block.rank << RANK_SHIFT)

    def load_global(self, addresses, width: int, mask) -> np.ndarray:
        addresses = self.active(addresses, mask)
        self.check_aligned(addresses, width)
        return self.spread(self.block.launch.memory.load(addresses, width), mask)

    def store_global(self, addresses, rows, mask) -> None:
        self.check_aligned(self.active(addresses, mask), rows.shape[1])
        self.block.launch.memory.store(self.active(addresses, mask), self.active(rows, mask))

    @staticmethod
    def check_aligned(addresses, width: int) -> None:
        if (addresses % U64(width)).any():
            raise Fault(f"{width} bytes of memory at an address that is no multiple of them")

    def atomic_add(self, addresses, values, mask) -> np.ndarray:
        before = np.zeros_like(values)
        for lane in np.arange(LANES) if mask is None else np.nonzero(mask)[0]:
            cell = self.block.launch.memory.bytes_at(int(addresses[lane]), values.itemsize).view(
                values.dtype
            )
            before[lane] = cell[0]
            cell[0] += values[lane]
        return before

    def store_matrices(self, addresses, values: list[np.ndarray], transposed: bool) -> None:
        """Stores 8 x 8 matrices: lane 8 i + r has the address of row r of matrix i, and every lane
        has two elements of each matrix."""
        for i, value in enumerate(values):
            halves = np.ascontiguousarray(value).view(U16).reshape(LANES, 2)
            for j in range(2):
                self.shared.store(
                    self.own(self.element_of_matrix(addresses, i, j, transposed)),
                    np.ascontiguousarray(halves[:, j : j + 1]).view(np.uint8),
                )

    def load_matrices(self, addresses, count: int, transposed: bool) -> list[np.ndarray]:
        """The same the other way round."""
        if (addresses[: 8 * count] % 16).any():
            raise Fault("a row of a matrix at an address that is no multiple of 16")
        return [
            np.concatenate(
                [
                    self.shared.load(
                        self.own(self.element_of_matrix(addresses, i, j, transposed)), 2
                    )
                    for j in range(2)
                ],
                axis=1,
            )
            .view(U32)
            .reshape(LANES)
            for i in range(count)
        ]

    @staticmethod
    def element_of_matrix(addresses, matrix: int, which: int, transposed: bool) -> np.ndarray:
        """Where one of the two elements is that each lane has of a matrix."""
        row, column = LANE // 4, 2 * (LANE % 4) + which
        if transposed:
            row, column = column, row
        return addresses[8 * matrix + row] + 2 * column

    # Barriers

    def _barrier(self, address: int) -> Barrier:
        rank, offset = address >> RANK_SHIFT, address & (1 << RANK_SHIFT) - 1
        barrier = self.peer(rank).barriers.get(offset)
        if barrier is None:
            raise Fault(f"no mbarrier at {offset}")
        return barrier

    def set_barrier(self, addresses, counts, mask) -> None:
        lane = 0 if mask is None else int(np.argmax(mask))
        self.block.barriers[int(self.own(addresses[lane]))] = Barrier(int(counts[lane]))

    def arrive_at_barrier(self, addresses, counts, bytes_expected, mask) -> None:
        for lane in range(LANES) if mask is None else np.nonzero(mask)[0]:
            self._barrier(int(addresses[lane])).arrive(int(counts[lane]), int(bytes_expected[lane]))

    def has_passed(self, addresses, parities, mask, number: int) -> bool:
        lane = 0 if mask is None else int(np.argmax(mask))
        passed = self._barrier(int(addresses[lane])).phase % 2 != int(parities[lane]) % 2
        if not passed:
            self.waiting = f"the mbarrier at {int(addresses[lane])}, instruction {number}"
        return passed

    def _wait(self, barriers: NamedBarriers, which, phase: int) -> bool:
        if barriers.phase.get(which, 0) != phase:
            self.arrived = None
            return True
        self.waiting = f"barrier {which}"
        return False

    def arrive_at_named_barrier(self, which: int, threads: int, mask) -> None:
        self.all_lanes(mask, "bar.arrive")
        self.block.named.arrive(which, threads)

    def wait_at_named_barrier(self, which: int, threads: int, mask) -> bool:
        self.all_lanes(mask, "bar.sync")
        if self.arrived is None:
            self.arrived = self.block.named.phase.get(which, 0)
            self.block.named.arrive(which, threads)
        return self._wait(self.block.named, which, self.arrived)

    def vote_at_named_barrier(self, which: int, threads: int, held, mask) -> bool | None:
        """bar.red.or: None while it waits. A phase's result stays until all have passed."""
        self.all_lanes(mask, "bar.red")
        if self.arrived is None:
            self.arrived = self.block.named.phase.get(which, 0)
            self.block.named.arrive(which, threads, bool(held.any()))
        passed = self._wait(self.block.named, which, self.arrived)
        return self.block.named.result[which] if passed else None

    def arrive_at_cluster_barrier(self, mask) -> None:
        self.all_lanes(mask, "barrier.cluster.arrive")
        barriers = self.block.peers[0].cluster_barrier
        self.cluster_phase = barriers.phase.get("cluster", 0)
        barriers.arrive("cluster", self.block.launch.threads * len(self.block.peers))

    def wait_at_cluster_barrier(self, mask) -> bool:
        self.all_lanes(mask, "barrier.cluster.wait")
        return self._wait(self.block.peers[0].cluster_barrier, "cluster", self.cluster_phase)

    # Asynchronous copies

    def _one(self, mask, what: str) -> int:
        if mask is None or mask.sum() != 1:
            raise Fault(f"{what} by {LANES if mask is None else mask.sum()} lanes")
        return int(np.argmax(mask))

    def load_box(self, target, tensor_map, coordinates, barrier, mask) -> None:
        lane = self._one(mask, "a TMA load")
        tensor = self.block.tensor_map(int(tensor_map[lane]))
        inside, addresses = tensor.elements([int(integers(c, "s32")[lane]) for c in coordinates])
        where = swizzled(int(self.own(target[lane])) + 2 * np.arange(addresses.size), tensor.span)
        self._load(where, 2, inside, addresses, self._barrier(int(barrier[lane])))

    def load_bulk(self, target, source, size, barrier, mask) -> None:
        lane = self._one(mask, "a bulk load")
        pieces = np.arange(0, int(size[lane]), 16)
        addresses = U64(source[lane]) + pieces.astype(U64)
        where = int(self.own(target[lane])) + pieces
        self._load(
            where, 16, np.ones(addresses.size, bool), addresses, self._barrier(int(barrier[lane]))
        )

    def _load(self, where, width: int, inside, addresses, barrier: Barrier) -> None:
        """Elements of `width` bytes, zeros for those not `inside` of the tensor."""

        def rows():
            found = np.zeros((addresses.size, width), np.uint8)
            found[inside] = self.block.launch.memory.load(addresses[inside], width)
            return found

        self.block.copies.append(Copy(self.block, where, rows, barrier))

    def copy_to_peer(self, target, source, size, barrier, mask) -> None:
        """From the thread block's shared memory to that of one in its cluster, with the barrier
        there."""
        lane = self._one(mask, "a bulk copy")
        rank, begin = divmod(int(target[lane]), 1 << RANK_SHIFT)
        if int(barrier[lane]) >> RANK_SHIFT != rank:
            raise Fault("a copy to one thread block with the barrier of another")
        pieces = np.arange(0, int(size[lane]), 16)
        rows = partial(self.shared.load, int(self.own(source[lane])) + pieces, 16)
        if not self.block.launch.lazy:
            rows = partial(np.asarray, rows())
        self.block.copies.append(
            Copy(self.peer(rank), begin + pieces, rows, self._barrier(int(barrier[lane])))
        )

    def store_box(self, source, tensor_map, coordinates, mask) -> None:
        """Stores a box of a tensor map. A whole warp may do so, because the SASS for it is executed
        once per warp."""
        lane = 0 if mask is None else self._one(mask, "a TMA store")
        tensor = self.block.tensor_map(int(tensor_map[lane]))
        inside, addresses = tensor.elements([int(integers(c, "s32")[lane]) for c in coordinates])

        def store():
            where = int(self.own(source[lane])) + 2 * np.arange(addresses.size)
            rows = self.shared.load(swizzled(where, tensor.span), 2)
            self.block.launch.memory.store(addresses[inside], rows[inside])

        self.open_stores.append(store)

    def add_bulk(self, target, source, size, mask) -> None:
        lane = self._one(mask, "a bulk reduction")

        def add():
            count = int(size[lane])
            begin = int(self.own(source[lane]))
            rows = self.shared.load(np.arange(begin, begin + count, 16), 16)
            sums = self.block.launch.memory.bytes_at(int(target[lane]), count).view(np.float32)
            sums += rows.reshape(-1).view(np.float32)

        self.open_stores.append(add)

    def commit_stores(self) -> None:
        self.stores.append(self.open_stores)
        self.open_stores = []
        if not self.block.launch.lazy:
            self.await_stores(0)

    def await_stores(self, pending: int) -> None:
        while len(self.stores) > pending:
            self.store_group()

    def store_group(self) -> None:
        for store in self.stores.pop(0):
            store()

    def load_later(self, target, source, width: int, given, mask) -> None:
        """cp.async: `given` bytes, the rest zeros."""
        self.check_aligned(self.active(source, mask), width)
        rows = np.zeros((LANES, width), np.uint8)
        lanes = np.arange(LANES) if mask is None else np.nonzero(mask)[0]
        for lane in lanes[given[lanes] > 0]:
            count = int(given[lane])
            rows[lane, :count] = self.block.launch.memory.bytes_at(int(source[lane]), count)
        self.open_loads.append((self.own(target[lanes]), rows[lanes]))

    def arrive_after_loads(self, barrier, mask) -> None:
        """cp.async.mbarrier.arrive.noinc: a phase of the barrier ends when the copies have, too."""
        if self.loads:
            raise Fault("groups of copies, and a barrier that waits for copies")
        for where, rows in self.open_loads:
            expecting = self._barrier(int(barrier[0]))
            expecting.bytes += rows.size
            self.block.copies.append(Copy(self.block, where, partial(np.asarray, rows), expecting))
        self.open_loads = []
        ones = full(1, U32)
        self.arrive_at_barrier(barrier, ones, ones - ones, mask)

    def commit_loads(self) -> None:
        self.loads.append(self.open_loads)
        self.open_loads = []

    def await_loads(self, pending: int) -> None:
        while len(self.loads) > pending:
            for where, rows in self.loads.pop(0):
                self.shared.store(where, rows)

    # Products

    def multiply(self, target, a, b, keep, transposed, columns: int, dtype: str, mask) -> None:
        self.all_lanes(mask, "wgmma")
        a = [x.copy() for x in a] if isinstance(a, list) else int(a[0])
        product = Product(target, a, int(b[0]), bool(keep[0]), transposed, columns, dtype)
        if self.block.launch.lazy:
            self.open_products.append(product)
        else:
            self._compute(product)

    def multiply_in_warp(self, a, b, sums, dtype: str, mask) -> list[np.ndarray]:
        """mma.sync: 16 rows of A, 8 columns of B."""
        self.all_lanes(mask, "mma")
        product = matrix_of_warp(a, dtype) @ matrix_of_warp(b, dtype, rows=8).T
        return [
            bits(product[LANE // 4 + 8 * (i // 2), 2 * (LANE % 4) + i % 2] + floats(each))
            for i, each in enumerate(sums)
        ]

    def commit_products(self) -> None:
        self.products.append(self.open_products)
        self.open_products = []

    def await_products(self, pending: int) -> None:
        if self.open_products:
            raise Fault("a wait for products that were not committed")
        while len(self.products) > pending:
            for product in self.products.pop(0):
                self._compute(product)

    def _compute(self, x: Product) -> None:
        """This warp's 16 rows of the warpgroup's 64."""
        if isinstance(x.a, list):
            a = matrix_of_warp(x.a, x.dtype)
        else:
            first = 16 * (self.index % WARPGROUP)
            a = self.shared.matrix(x.a, 64, bool(x.transposed[0]), x.dtype)[first : first + 16]
        product = a @ self.shared.matrix(x.b, x.columns, bool(x.transposed[1]), x.dtype).T
        for i, index in enumerate(x.target):
            part = product[LANE // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANE % 4) + i % 2]
            self.registers[index] = bits(part + floats(self.registers[index]) if x.keep else part)

    # Products of Blackwell, in tensor memory

    def _meets_peer(self, what: str) -> bool:
        """A warp of each thread block of a pair takes and returns columns, and waits for the
        other."""
        barriers = self.block.peers[0].cluster_barrier
        if self.arrived is None:
            self.arrived = barriers.phase.get(what, 0)
            barriers.arrive(what, LANES * len(self.block.peers))
        return self._wait(barriers, what, self.arrived)

    def take_columns(self, target, columns: int, pair: bool, mask) -> bool:
        self.all_lanes(mask, "tcgen05.alloc")
        if self.arrived is None:
            self.shared.store(
                self.own(target[:1]), np.array([[self.block.tensors.taken]], U32).view(np.uint8)
            )
            self.block.tensors.taken += columns
        if self.block.tensors.taken > 512:
            raise Fault(f"{self.block.tensors.taken} columns of tensor memory")
        return not pair or self._meets_peer("tcgen05.alloc")

    def return_columns(self, columns: int, pair: bool, mask) -> bool:
        self.all_lanes(mask, "tcgen05.dealloc")
        if pair and not self._meets_peer("tcgen05.dealloc"):
            return False
        self.block.tensors.taken -= columns
        return True

    def _own_lanes(self, address: int, columns: int, mask) -> np.ndarray:
        self.all_lanes(mask, "tcgen05.ld or st")
        if address >> 16 != LANES * (self.index % WARPGROUP):
            raise Fault(f"warp {self.index} at lane {address >> 16} of tensor memory")
        return self.block.tensors.part(address, LANES, columns)

    def load_tensor_memory(self, address: int, columns: int, mask) -> np.ndarray:
        """At once, though not before a wait by PTX's book: many loads are without one, and ptxas
        waits for their registers."""
        return self._own_lanes(address, columns, mask).copy()

    def store_tensor_memory(self, address: int, values: list[np.ndarray], mask) -> None:
        self.tensor_stores.append((self._own_lanes(address, len(values), mask), values))
        if not self.block.launch.lazy:
            self.await_tensor_stores()

    def await_tensor_stores(self) -> None:
        for part, values in self.tensor_stores:
            part[:] = np.stack(values, axis=1)
        self.tensor_stores.clear()

    def commit_tensor_products(self, barrier, ranks, mask) -> None:
        """`ranks`: bits of the cluster's thread blocks whose barriers at this place get an
        arrival."""
        lane = self._one(mask, "tcgen05.commit")
        address = int(barrier[lane])
        offset = address & (1 << RANK_SHIFT) - 1
        chosen = (
            [address]
            if ranks is None
            else [offset + (i << RANK_SHIFT) for i in range(16) if int(ranks[lane]) >> i & 1]
        )

        def arrive():
            for one in chosen:
                self._barrier(one).arrive(1, 0)

        if self.block.tensor_work:
            self.block.tensor_work[-1].append(arrive)
        else:
            arrive()

    def multiply_tensors(
        self, target, a, a_in_tensor_memory: bool, b, description, keep, left_out, pair: bool, mask
    ) -> None:
        lane = self._one(mask, "tcgen05.mma")
        target, a, b, keep, what = (
            int(target[lane]),
            int(a[lane]),
            int(b[lane]),
            bool(keep[lane]),
            int(description[lane]),
        )
        dtype = {0: "f16", 1: "bf16"}[what >> 7 & 7]
        a_transposed, b_transposed, columns, rows = (
            what >> 15 & 1,
            what >> 16 & 1,
            (what >> 17 & 63) * 8,
            (what >> 24 & 31) * 16,
        )
        ranks = range(len(self.block.peers)) if pair else [self.block.rank]
        share_rows = rows // len(ranks)
        if any(lanes[lane] for lanes in left_out):
            raise Fault("a product that leaves out lanes")
        if (
            what >> 4 & 3 != 1
            or share_rows not in (64, 128)
            or (share_rows == 64 and (not pair or a_in_tensor_memory))
        ):
            raise Fault(
                f"a product into {rows} rows, or not into fp32: instruction descriptor {what:#x}"
            )

        def multiply():
            # Each thread block of a pair has its rows of A and of D, and half of B's columns.
            blocks = [self.peer(rank) for rank in ranks]
            share = columns // len(blocks)
            n = np.concatenate(
                [block.shared.matrix(b, share, bool(b_transposed), dtype) for block in blocks]
            )
            for block in blocks:
                if a_in_tensor_memory:
                    words = np.ascontiguousarray(block.tensors.part(a, 128, 8)).view(U16)
                    m = widened(words, dtype)
                else:
                    m = block.shared.matrix(a, share_rows, bool(a_transposed), dtype)
                product = m @ n.T
                if share_rows == 64:  # D's left half in lanes 0 to 63, the right one in the others
                    product = np.concatenate(np.split(product, 2, axis=1))
                d = block.tensors.part(target, *product.shape)
                d[:] = np.ascontiguousarray(product + d.view(np.float32) if keep else product).view(
                    U32
                )

        self.block.tensor_work.append([multiply])
        if not self.block.launch.lazy:
            self.block.work_on_tensors()


@dataclass(frozen=True)
class Copy:
    """To shared memory, under way."""

    block: "ThreadBlock"
    where: np.ndarray
    rows: Callable[[], np.ndarray]  # the bytes for each place
    barrier: Barrier


class ThreadBlock:
    PARAMETERS = 1 << 52  # generic address of the first

    def __init__(self, launch: Launch, number: int, peers: list["ThreadBlock"]):
        """`peers`: the thread blocks of its cluster, itself among them."""
        self.launch, self.threads, self.peers, self.rank = (
            launch,
            launch.threads,
            peers,
            number % launch.cluster,
        )
        x, y, _ = launch.grid
        self.place = (number % x, number // x % y, number // (x * y))
        self.shared, self.tensors = SharedMemory(launch.shared_bytes), TensorMemory()
        self.shared_base = (self.rank << RANK_SHIFT) + SharedMemory.BASE
        # products in order, each with the arrivals that it sets off
        self.tensor_work: list[list[Callable[[], None]]] = []
        self.barriers: dict[int, Barrier] = {}
        self.named, self.cluster_barrier = NamedBarriers(), NamedBarriers()
        self.copies: list[Copy] = []
        self.ended = False
        self.tensor_maps: dict[int, TensorMap] = {}
        self.random = random.Random(launch.seed * 1009 + number)
        self.warps = [Warp(self, index) for index in range(launch.threads // LANES)]

    def parameter(self, begin: int, size: int) -> np.ndarray:
        return np.broadcast_to(self.launch.parameters[begin : begin + size], (LANES, size))

    def tensor_map(self, address: int) -> TensorMap:
        begin = address - self.PARAMETERS
        if begin not in self.tensor_maps:
            self.tensor_maps[begin] = TensorMap(
                self.launch.parameters[begin : begin + 128].tobytes()
            )
        return self.tensor_maps[begin]

    @staticmethod
    def in_cluster(addresses, ranks) -> np.ndarray:
        return (addresses & U32((1 << RANK_SHIFT) - 1)) + (ranks << RANK_SHIFT)

    def work_on_tensors(self) -> None:
        for work in self.tensor_work.pop(0):
            work()

    def deliver(self) -> None:
        """A copy, or a piece of the tensor cores' work."""
        if self.tensor_work and (not self.copies or self.random.random() < 0.5):
            self.work_on_tensors()
            return
        copy = self.copies.pop(self.random.randrange(len(self.copies)))
        if copy.block.ended:
            raise Fault("a copy to a thread block that has ended")
        rows = copy.rows()
        copy.block.shared.store(copy.where, rows)
        copy.barrier.bytes -= rows.size
        copy.barrier.settle()

    def run(self) -> Iterator[bool]:
        """Yields now and then, with whether it got on."""
        live, chance = list(self.warps), self.random.choice((0.05, 0.3))
        while live:
            before, got_on = len(live), False
            for _ in range(16):
                warp = self.random.choice(live)
                for _ in range(self.random.choice((1, 3, 20, 200))):
                    warp.step()
                    if warp.done or warp.waiting:
                        break
                got_on |= warp.done or warp.steps_since_waiting > POLLS
                if warp.stores and self.random.random() < 0.02:
                    warp.store_group()
                if (self.copies or self.tensor_work) and self.random.random() < chance:
                    self.deliver()
                    got_on = True
                live = [warp for warp in live if not warp.done]
                if not live:
                    break
            yield got_on or len(live) < before
        self.ended = True
        if self.copies or self.tensor_work:
            raise Fault("a thread block ends with copies or products under way")


def run(launch: Launch) -> None:
    """All thread blocks at a time."""
    count = launch.grid[0] * launch.grid[1] * launch.grid[2]
    blocks: list[ThreadBlock] = []
    for first in range(0, count, launch.cluster):
        peers: list[ThreadBlock] = []
        peers += [
            ThreadBlock(launch, number, peers) for number in range(first, first + launch.cluster)
        ]
        blocks += peers
    order = random.Random(launch.seed)
    running = {block: block.run() for block in blocks}
    idle = 0
    while running:
        block = order.choice(list(running))
        got_on = next(running[block], None)
        if got_on is None:
            del running[block]
        idle = 0 if got_on is not False else idle + 1
        if idle > 100 * len(running):
            waiting = [block for block in running if block.copies or block.tensor_work]
            if not waiting:
                stuck = {
                    f"warp {warp.index}: {warp.waiting or 'polls'}"
                    for block in running
                    for warp in block.warps
                    if not warp.done
                }
                raise Fault(f"deadlock: {'; '.join(sorted(stuck))}")
            order.choice(waiting).deliver()
            idle = 0
