"""In-place operators: the caller's tensors really change, and every view sees what eager's would."""

from __future__ import annotations

import pytest
import torch
from capturing import run, same

from mpk_dynamo.errors import Unsupported
from mpk_dynamo.ir.types import BufferKind

Tensor = torch.Tensor


def test_a_view_taken_before_a_write_sees_it_and_a_copy_does_not() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        view, row, copy, folded = x.t(), x[1], x.clone(), x.t().reshape(-1)
        same_memory = x.view(-1)
        x.mul_(2)
        row.add_(1)
        return view + 0, row + 0, copy + 0, folded + 0, same_memory + 0, x.sum()

    found = same(function, torch.randn(3, 4), ulps=2)
    assert found.graph.buffers["x"].kind is BufferKind.STATE
    assert [n for n in found.graph.buffers if n.startswith("x@")] == ["x@1", "x@2"]
    assert all(b.storage == "x" for n, b in found.graph.buffers.items() if n.startswith("x@"))


def test_a_tensor_that_is_returned_is_handed_back_itself() -> None:
    ours, _, found, (x,), _ = run(lambda x: (x.add_(1), x * 2), torch.randn(3))
    assert ours[0].data_ptr() == x.data_ptr() != ours[1].data_ptr()
    assert [o.buffer for o in found.graph.outputs] == ["x@1", "mul"]


def test_writes_through_views() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x[:, 1:3] = y[:, :2]
        x[0] += 1
        x.t()[3].zero_()
        x[:, ::2].copy_(x[:, 1::2])
        x[1, 1:].fill_(7)
        x.view(-1)[3:5].mul_(3)
        return x * 2

    same(function, torch.randn(3, 6), torch.randn(3, 6))


def test_a_write_that_reads_what_it_overwrites() -> None:
    def function(x: Tensor) -> Tensor:
        x.copy_(x.flip(0))
        x[1:] = x[:-1].clone()
        x.copy_(x.roll(1, 1))
        return x.mean()

    same(function, torch.randn(4, 5), ulps=2)


def test_rows_written_at_a_position_of_the_data() -> None:
    def function(cache: Tensor, position: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        at = position + torch.arange(1)
        position.add_(1)
        cache.index_copy_(1, at, row)
        return cache.sum(1), position + at

    found = same(function, torch.randn(2, 6, 3), torch.tensor(4), torch.randn(2, 1, 3), ulps=2)
    (write,) = [n for n in found.graph.nodes if n.out == "cache@1"]
    assert [v.size for v in write.dims] == [2, 1, 3], "only the row is written"


def test_rows_written_by_index() -> None:
    def function(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
        x[:, i] = y
        x[i[:1]] = y[0, 0]
        x[-1] = y[1, 1, 0]
        fresh = torch.zeros(4, 4, dtype=y.dtype)
        fresh.index_copy_(1, i[:1], y[:, :1, 0])
        return x * 2, fresh

    same(function, torch.randn(4, 6, 3), torch.tensor([1, 3]), torch.randn(4, 2, 3)[:, :, :1].expand(4, 2, 3))


def test_a_sliding_window_moves_in_place() -> None:
    def function(window: Tensor, new: Tensor) -> Tensor:
        moved = window.roll(-1, dims=1)
        moved[:, -1] = new
        window.copy_(moved)
        return window + 0

    same(function, torch.randn(2, 5, 3), torch.randn(2, 3))


def test_constants_and_none_are_returned_as_they_are() -> None:
    # a whole graph of Dynamo returns tensors only, so this is one made by hand
    from capturing import Grab

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.neg, (x,))
    graph.output((y, 3, None, y, graph.call_method("t", (y,))))
    grab, x = Grab(), torch.randn(2, 3)
    a, number, nothing, b, turned = grab(torch.fx.GraphModule({}, graph), [x])(x)
    assert (number, nothing) == (3, None)
    assert torch.equal(a, -x) and torch.equal(b, -x) and torch.equal(turned, -x.t())
    assert b.data_ptr() == a.data_ptr() == turned.data_ptr() and len(grab.found[0].graph.nodes) == 1


def test_inputs_that_share_memory_with_a_written_one_are_refused() -> None:
    from capturing import Grab

    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    z = graph.call_method("add_", (x, 1))
    graph.output((graph.call_function(torch.add, (z, y)),))
    base = torch.randn(4)
    with pytest.raises(Unsupported, match="x is written in place and shares its memory with y"):
        Grab()(torch.fx.GraphModule({}, graph), [base[:2], base[1:3]])


def test_unused_work_is_dropped_and_writes_are_not() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        torch.sort(y)  # would be refused if it were looked at
        _ = (y * 3).add_(1)
        x.add_(1)
        return y + 1

    found = same(function, torch.randn(3), torch.randn(3))
    assert [n.out for n in found.graph.nodes] == ["x@1", "add"]
