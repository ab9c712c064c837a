"""Runs one case and says what is wrong with its results."""

from __future__ import annotations

import torch
from cases import Inputs
from compare import GRADIENT_FLOOR, assert_close, assert_lse
from reference import compute

from fuzz.case import Case, fused_backend, runs_on_ours, stock_agrees
from fuzz.faults import Arguments
from fuzz.ops import GRADIENTS, Outcome, Results, heads_first, run, run_halves
from fuzz.tensors import (
    forward_arguments,
    keys_in_use,
    make_inputs,
    outside,
    used,
    with_keys_in_use,
)

# Without dropout these are uninitialised. PyTorch's kernel writes only a part of the mask.
UNINITIALISED = ("rng_state", "unused", "debug_mask")
# What atomic additions in another order may change of PyTorch's gradients, relative to the largest
# of them.
ORDER_TOLERANCE = 2**-6


def check(case: Case, engine) -> str:
    """Returns who ran the case: "ours", "stock", "mixed" (the forward one and the backward the
    other) or "rejected" (both raise).

    Raises:
        AssertionError: what is wrong.
    """
    inputs = make_inputs(case, engine.device)
    arguments = forward_arguments(case, inputs)
    before = _storages([inputs.do, *(value for name, value in arguments.items() if name != "out")])
    with engine.registered(strict=False, speed_rules=case.speed_rules):
        forward_ours = engine.explain(case, arguments, backward=False)
        backward_ours = case.backward and engine.explain(case, arguments, backward=True)
    expected = runs_on_ours(case, engine.largest_head_dim)
    assert case.speed_rules or forward_ours == expected, (
        f"explain says {forward_ours}, the generator {expected}"
    )

    def call(backward: bool) -> Outcome:
        return run(
            case, inputs, arguments, engine.ops, lambda: engine.poison(inputs), backward=backward
        )

    all_ours = forward_ours and (backward_ours or not case.backward) and not case.fault
    with engine.registered(strict=all_ours, speed_rules=case.speed_rules):
        first = call(case.backward)
        again = call(case.deterministic and backward_ours) if all_ours and not first.error else None
    _assert_unchanged(before)
    if forward_ours and not case.fault:
        assert not first.error, f"the {first.stage} raised {_described(first.error)}"
        assert_promises(case, arguments, first.results, gradients=backward_ours)
        _assert_math(case, inputs, first.results, _checked(case, first.results, backward_ours))
        if case.backward:
            _assert_zero_outside(case, first.results, backward_ours)
        if again:
            _assert_same_bits(case, "the second run", first.results, again.results)
        if all_ours and case.halves and not case.seqused_k and stock_agrees(case):
            _check_halves(case, inputs, arguments, engine)
        return "ours" if all_ours else "mixed"
    stock = call(case.backward)
    _assert_same_end(first, stock)
    if first.error:
        return "rejected"
    _assert_same_as_stock(case, first.results, stock.results, gradients=not backward_ours)
    if backward_ours:
        _assert_math(case, inputs, first.results, GRADIENTS)
        return "mixed"
    return "stock"


def _storages(values) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the bytes of everything that the tensors lie in, and a copy of them."""
    storages = {
        value.untyped_storage().data_ptr(): value
        for value in values
        if isinstance(value, torch.Tensor)
    }
    whole = [
        torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
        for t in storages.values()
    ]
    return [(t, t.clone()) for t in whole]


def _assert_unchanged(storages) -> None:
    for now, before in storages:
        assert torch.equal(now, before), (
            f"{int((now != before).sum())} of {now.numel()} bytes of an input, or beside it, "
            "changed"
        )


def _described(error: Exception | None) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if error
        else "nothing"
    )


def _assert_same_end(ours: Outcome, stock: Outcome) -> None:
    """Asserts that both return, or both raise the same error in the same step. Further lines of its
    text may list what is registered."""
    assert _described(ours.error) == _described(stock.error) and ours.stage == stock.stage, (
        f"registered, the {ours.stage} raised {_described(ours.error)}; not registered, the "
        f"{stock.stage} raised "
        f"{_described(stock.error)}"
    )


def _assert_zero_outside(case: Case, results: Results, backward_ours: bool) -> None:
    """Checks the gradients of rows that belong to no sequence: those of our backward, and those of
    PyTorch's where a speed rule chooses it."""
    if not any(case.unused_rows) or not (backward_ours or case.speed_rules):
        return
    for name in GRADIENTS:
        wrong = int((outside(case, results[name]) != 0).sum())
        assert not wrong, f"{name}: {wrong} elements in rows that belong to no sequence are not 0"


def _check_halves(case: Case, inputs: Inputs, arguments: Arguments, engine) -> None:
    """Runs forward and backward on different kernels. Logsumexps of rows without keys differ in
    their sign."""
    forward_ours = case.halves == "ours-stock"
    results = run_halves(case, inputs, arguments, engine, forward_ours)
    names = [
        name for name in _checked(case, results, backward_ours=not forward_ours) if name != "lse"
    ]
    try:
        _assert_math(case, inputs, results, names)
    except AssertionError as error:
        raise AssertionError(f"{case.halves}: {error}") from None


def _checked(case: Case, results: Results, backward_ours: bool) -> list[str]:
    """Returns the results that have a right answer."""
    without_queries = case.layout == "varlen" and 0 in case.problem.seqlens_q
    names = [name for name in ("out", "lse", *GRADIENTS) if name in results]
    # PyTorch's kernel leaves dk and dv of a sequence without queries as they were.
    return (
        names
        if backward_ours or not without_queries
        else [name for name in names if name not in ("dk", "dv")]
    )


def _promised(t: torch.Tensor, rows_first: bool) -> tuple:
    """Returns what is promised of a result like `t`: its own order of dimensions, or with the heads
    of a row side by side, as memory-efficient attention has it."""
    if rows_first:
        by_rows = t.transpose(1, 2)
        like = torch.empty_like(by_rows, memory_format=torch.contiguous_format).transpose(1, 2)
    else:
        like = torch.empty_like(t)
    return tuple(like.shape), like.stride(), like.dtype, like.device


def _found(t: torch.Tensor) -> tuple:
    return tuple(t.shape), t.stride(), t.dtype, t.device


def assert_promises(
    case: Case, arguments: Arguments, results: Results, *, gradients: bool = True
) -> None:
    """Asserts sizes, strides, dtypes and devices as PyTorch's meta functions have them. Stock's
    gradients of expanded tensors differ."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    lse_shape = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    if case.op in ("sdpa", "functional"):
        query, key, value = (t.detach() for t in heads_first(case, arguments))
    rows_first = case.op == "functional" and fused_backend(case) == "efficient"
    promised = {"out": query} | ({"dq": query, "dk": key, "dv": value} if gradients else {})
    for name, like in promised.items():
        if name in results:
            found, wanted = _found(results[name]), _promised(like, rows_first)
            # The head dim is padded and cut again.
            if case.op == "functional" and case.problem.head_dim % 8:
                found, wanted = found[:1] + found[2:], wanted[:1] + wanted[2:]
            assert case.op == "inplace" or found == wanted, (
                f"{name} is {found}, promised is {wanted}"
            )
    if "lse" in results:
        lse = results["lse"]
        assert (
            tuple(lse.shape) == lse_shape and lse.is_contiguous() and lse.dtype == torch.float32
        ), f"lse is {_found(lse)}"
    if "rng_state" in results:
        found = [(tuple(results[name].shape), results[name].dtype) for name in UNINITIALISED]
        assert found == [((2,), torch.uint64), ((), torch.uint64), ((0,), query.dtype)], (
            f"{UNINITIALISED} are {found}"
        )


def _assert_math(case: Case, inputs: Inputs, results: Results, names) -> None:
    """Compares against fp32, as the other tests do, and allows a few roundings of the largest value
    more, since a tensor may have few elements."""
    names = [name for name in names if name in results]
    tensors = {name: used(case, name, getattr(inputs, name)) for name in ("q", "k", "v", "do")}
    problem = case.problem
    if case.seqused_k:
        tensors |= {
            name: keys_in_use(problem, case.seqused_k, tensors[name]) for name in ("k", "v")
        }
        problem = with_keys_in_use(case)
    backward = any(name in GRADIENTS for name in names)
    truth, plain = (
        compute(problem, Inputs(**tensors, bias=inputs.bias), dtype, backward=backward)
        for dtype in (torch.float32, problem.dtype)
    )
    rounding = torch.finfo(case.problem.dtype).eps / 2
    for name in names:
        exact = getattr(truth, name)
        found = _sequence_first(case, name, used(case, name, results[name]))
        if name == "lse":
            assert_lse(found, exact)
            continue
        largest = exact.abs().max().item() if exact.numel() else 0.0
        floor = 4 * rounding * largest + (GRADIENT_FLOOR if name in GRADIENTS else 0.0)
        assert_close(name, found, getattr(plain, name), exact, floor)


def _sequence_first(case: Case, name: str, t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2) if case.op in ("sdpa", "functional") and name != "lse" else t


def _bits(t: torch.Tensor) -> torch.Tensor:
    """Returns the values as integers, with one kind of NaN."""
    return (
        t.masked_fill(t.isnan(), float("nan"))
        .contiguous()
        .view({2: torch.int16, 4: torch.int32}[t.dtype.itemsize])
    )


def _assert_same_bits(case: Case, what: str, first: Results, other: Results) -> None:
    for name in (name for name in other if name not in UNINITIALISED):
        a, b = (_bits(used(case, name, results[name])) for results in (first, other))
        assert torch.equal(a, b), (
            f"{name}: {what} differs at {int((a != b).sum())} of {a.numel()} elements"
        )


def _assert_same_as_stock(case: Case, ours: Results, stock: Results, *, gradients: bool) -> None:
    names = [name for name in stock if gradients or name not in GRADIENTS]
    for name in names:
        found, wanted = ((None if t is None else _found(t)) for t in (ours.get(name), stock[name]))
        assert found == wanted, f"{name} is {found}, not registered {wanted}"
    exact = [name for name in names if name not in GRADIENTS]
    if not gradients or not case.backward:
        return _assert_same_bits(
            case, "not registered", ours, {name: stock[name] for name in exact}
        )
    written = [name for name in _checked(case, stock, backward_ours=False) if name in GRADIENTS]
    if case.deterministic:
        return _assert_same_bits(
            case, "not registered", ours, {name: stock[name] for name in (*exact, *written)}
        )
    _assert_same_bits(case, "not registered", ours, {name: stock[name] for name in exact})
    for name in written:
        _assert_near(name, *(used(case, name, results[name]).float() for results in (ours, stock)))
    return None


def _assert_near(name: str, ours: torch.Tensor, stock: torch.Tensor) -> None:
    """Compares finite values alone: a sum that overflows depends on the order."""
    if not stock.numel() or not (ours.isfinite().all() and stock.isfinite().all()):
        return
    difference, largest = (ours - stock).abs().max().item(), stock.abs().max().item()
    assert difference <= ORDER_TOLERANCE * largest + GRADIENT_FLOOR, (
        f"{name}: differs by {difference:.3e} from that of PyTorch's kernel not registered, whose "
        f"largest is {largest:.3e}"
    )
