"""The CUDA renderer of expressions: what text comes out, and what is refused."""

from __future__ import annotations

import pytest

from mpk_dynamo.codegen.expressions import (
    Emitter,
    Operands,
    aligned_loads,
    ctype,
    guarded_loads,
    literal,
    row_function,
    split_index,
    unconditional_loads,
)
from mpk_dynamo.errors import Unsupported
from mpk_dynamo.ir.expr import Expr, cast, const, index, load, op, reduce, var, where
from mpk_dynamo.ir.types import BufferKind, DType, buffer

F32, BF16, I64 = DType.F32, DType.BF16, DType.I64
BUFFERS = {
    b.name: b
    for b in (
        buffer("x", BF16, (4, 64), BufferKind.INPUT),
        buffer("y", F32, (4, 64), BufferKind.INPUT),
        buffer("odd", BF16, (4, 63), BufferKind.INPUT),
        buffer("ids", I64, (4,), BufferKind.INPUT),
        buffer("table", BF16, (50, 64), BufferKind.PARAM),
        buffer("huge", BF16, (1 << 20, 1 << 12), BufferKind.PARAM),
    )
}
ROW, J = var("i", 4), var("j", 64)


def at(name: str, *idx: Expr) -> Expr:
    return load(name, idx, BUFFERS[name].dtype)


def emitter(**names: Expr) -> Emitter:
    return Emitter(BUFFERS, Operands(), {v: n for n, v in (names or {"i": ROW, "j": J}).items()})


def emitted(e: Expr) -> tuple[list[str], str]:
    made = emitter()
    value = made.emit(e)
    return made.lines, value


def row_text(elements: tuple[Expr, ...], body: Expr) -> str:
    """The function of row i."""
    operands = Operands()
    return row_function(
        "row",
        (("i", ROW),),
        elements,
        body,
        lambda names: Emitter(BUFFERS, operands, names),
        lambda _, value: f"keep({value});",
    )


def test_a_value_used_twice_is_computed_once() -> None:
    x = cast(at("x", ROW, J), F32)
    lines, _ = emitted(op("add", op("mul", x, x), x))
    assert sum("load1" in line for line in lines) == 1


def test_casts_to_narrow_types_round() -> None:
    lines, value = emitted(cast(cast(op("mul", at("y", ROW, J), at("y", ROW, J)), BF16), F32))
    text = " ".join(lines)
    assert "round_to<bf16>" in text and "const float" in text and value.startswith("v")


def test_products_and_sums_are_left_as_the_graph_has_them() -> None:
    y = at("y", ROW, J)
    text = " ".join(emitted(op("add", op("mul", y, const(3.0, F32)), y))[0])
    assert "fmaf" not in text and " * 3.0f" in text


def test_a_load_under_where_is_never_hoisted() -> None:
    """Either side may be outside its buffer when the condition is false: a concatenation."""
    left, right = at("y", ROW, J), at("y", ROW, op("sub", J, index(32)))
    lines, _ = emitted(where(op("lt", J, index(32)), left, right))
    branches = [line for line in lines if line.startswith(("if", "else"))]
    assert len(branches) == 2 and all("load1" in b for b in branches)
    assert not any("load1" in line for line in lines if line not in branches)


def test_a_where_without_loads_is_a_selection() -> None:
    lines, _ = emitted(where(op("lt", J, index(32)), const(1.0, F32), const(2.0, F32)))
    assert any("?" in line for line in lines) and not any(line.startswith("if") for line in lines)


def test_an_index_from_data_is_checked_and_an_affine_one_is_not() -> None:
    gathered = " ".join(emitted(at("table", at("ids", ROW), J))[0])
    assert "c.checked(" in gathered and ", 50) * 64ll" in gathered
    assert "checked" not in " ".join(emitted(at("x", ROW, J))[0])


def test_operands_are_numbered_by_first_use() -> None:
    made = emitter()
    made.emit(op("add", at("y", ROW, J), cast(at("x", ROW, J), F32)))
    made.emit(at("y", ROW, index(0)))
    assert made.operands.names == ["y", "x"] and "pointer<float>(0)" in made.lines[-1]


def test_integers_are_32_bit_only_where_their_range_allows() -> None:
    assert ctype(op("mul", ROW, J)) == "int"
    assert ctype(at("ids", ROW)) == "i64"
    assert ctype(op("mul", J, index(1 << 40))) == "i64"


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (1.5, F32, "1.5f"), (-2.0, F32, "(-2.0f)"), (1e-6, F32, "1e-06f"), (float("inf"), F32, "infinity()"),
        (float("-inf"), F32, "-infinity()"), (True, DType.BOOL, "true"), (-3, I64, "(-3)"),
        (1 << 40, I64, f"{1 << 40}ll"),
    ],
)  # fmt: skip
def test_literals(value: float, dtype: DType, text: str) -> None:
    assert literal(const(value, dtype)) == text


def test_division_of_what_may_be_negative_floors() -> None:
    unknown = at("ids", ROW)
    assert "floor_div(" in " ".join(emitted(op("floordiv", unknown, index(8)))[0])
    assert "floor_mod(" in " ".join(emitted(op("mod", unknown, index(8)))[0])
    assert "floor" not in " ".join(emitted(op("add", op("floordiv", J, index(8)), op("mod", J, index(7))))[0])


def test_what_is_refused() -> None:
    with pytest.raises(Unsupported, match="more than 2\\*\\*31 elements"):
        emitted(at("huge", var("i", 1 << 20), J))
    with pytest.raises(Unsupported, match="not available here"):
        emitted(at("y", var("elsewhere", 4), J))
    made = emitter()
    with pytest.raises(Unsupported, match="not contiguous along j"):
        made.offset(BUFFERS["x"], (ROW, op("mul", J, index(2))), J)


def test_which_loads_are_vectors() -> None:
    x = at("x", ROW, J)
    e = op("add", cast(x, F32), cast(at("odd", ROW, J), F32))
    assert aligned_loads(e, BUFFERS, J, 8) == [x]
    assert aligned_loads(cast(at("x", ROW, op("add", J, index(1))), F32), BUFFERS, J, 8) == []
    assert aligned_loads(where(op("lt", ROW, index(1)), x, const(0.0, BF16)), BUFFERS, J, 8) == []
    row = at("table", at("ids", ROW), J)  # whatever row it is, rows start at vectors
    assert row in aligned_loads(cast(row, F32), BUFFERS, J, 8)


def test_guarded_loads_carry_their_conditions() -> None:
    low, a, b, c = op("lt", J, index(32)), at("y", ROW, J), at("y", ROW, index(0)), at("y", ROW, index(1))
    e = op("add", where(low, a, b), op("add", c, reduce("sum", var("r", 64), at("y", ROW, var("r", 64)))))
    found = dict(guarded_loads(e))
    assert found == {a: (low,), b: (op("not", low),), c: ()}, "a reduction's own loads are no loads of the row"
    assert unconditional_loads(e) == [c]
    by_data = where(op("lt", at("ids", ROW), index(3)), a, b)
    assert [ld for ld, _ in guarded_loads(by_data)] == [at("ids", ROW)]


def test_a_row_that_fits_in_registers_is_loaded_once_before_its_reduction() -> None:
    r = var("r", 64)
    total = reduce("sum", r, op("mul", at("y", ROW, r), at("y", ROW, r)))
    body = op("mul", at("y", ROW, J), op("rsqrt", total))
    text = row_text((J,), body)
    assert text.count("load1(") == 1
    assert text.index("load1(") < text.index("reduce<Sum>") < text.index("rsqrtf(") < text.index("keep(out[u])")


def test_a_longer_row_is_read_again_for_its_reduction() -> None:
    r = var("r", 64)
    body = op("add", at("y", ROW, J), reduce("max", r, at("y", op("sub", index(3), ROW), r)))
    wide = var("k", 4)
    text = row_text((wide, J), body)
    assert "for (int r = g.rank; r < 64; r += G::SIZE)" in text and "reduce<Max>" in text
    assert text.count("load1(") == 2


def test_a_reduction_that_depends_on_the_element_is_refused() -> None:
    r = var("r", 64)
    inner = reduce("sum", r, op("mul", at("y", ROW, r), at("y", ROW, J)))
    with pytest.raises(Unsupported, match="reduction"):
        row_text((J,), inner)


def test_split_index_is_row_major() -> None:
    a, b, c = var("a", 2), var("b", 3), var("c", 5)
    parts = split_index("e", (a, b, c))
    for e in range(30):
        values = [eval(parts[v][1].replace("/", "//"), {"e": e}) for v in (a, b, c)]
        assert (values[0] * 3 + values[1]) * 5 + values[2] == e
