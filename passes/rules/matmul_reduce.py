"""Rules of operators that multiply and sum: linear, matrix products, einsum, reductions."""

from __future__ import annotations

from xdit_compile.passes.axes.operators import LinearOp
from xdit_compile.passes.axes.rule import Kind, Rule, RuleBook, type_opaquely

BOOK = RuleBook()


@BOOK.rule("linear")
def linear(rule: Rule) -> None:
    """A map over rows and over columns of the result, a sum over what is contracted."""
    rule.operator = LinearOp()
    last = len(rule.actual[0]) - 1
    for dim in range(last):
        rule.loop("map", [(0, dim)], [(0, dim)])
    rule.loop("sum", [(0, last), (1, 1)], [])
    columns = [(1, 0)]
    if len(rule.operands) > 2:
        columns.append((2, 0))
        rule.bias = 2
    rule.loop("map", columns, [(0, last)])


@BOOK.rule("mm", "bmm", "matmul", "mv", "dot")
def matmul(rule: Rule) -> None:
    """A map over batch, rows and columns, a sum over what is contracted; a vector has no row or no column."""
    left, right = len(rule.actual[0]), len(rule.actual[1])
    rank = len(rule.out_shape())
    rule.loop("sum", [(0, left - 1), (1, max(right - 2, 0))], [])
    trailing = (left > 1) + (right > 1)
    for dim in range(rank - trailing):
        _batch(rule, dim, rank - trailing, {0: left - 2, 1: right - 2})
    if left > 1:
        rule.loop("map", [(0, left - 2)], [(0, rank - trailing)])
    if right > 1:
        rule.loop("map", [(1, right - 1)], [(0, rank - 1)])


def _batch(rule: Rule, dim: int, rank: int, batch_dims: dict[int, int]) -> None:
    size = rule.out_shape()[dim]
    users = []
    for operand, count in batch_dims.items():
        operand_dim = dim - (rank - count)
        if operand_dim >= 0 and rule.shape(operand)[operand_dim] == size:
            users.append((operand, operand_dim))
    rule.loop("map", users, [(0, dim)])


@BOOK.rule("addmm")
def addmm(rule: Rule) -> None:
    """A map over rows and columns, a sum over what is contracted; what is added is broadcast."""
    rule.loop(_contracted(rule), [(1, 1), (2, 0)], [])
    _added(rule, {0: [(1, 0)], 1: [(2, 1)]})


@BOOK.rule("baddbmm")
def baddbmm(rule: Rule) -> None:
    """A map over batch, rows and columns, a sum over what is contracted; what is added is broadcast."""
    rule.loop(_contracted(rule), [(1, 2), (2, 1)], [])
    _added(rule, {0: [(1, 0), (2, 0)], 1: [(1, 1)], 2: [(2, 2)]})


def _contracted(rule: Rule) -> Kind:
    """A product that is scaled while something is added to it is not taken apart into partial sums."""
    scaled = rule.node.kwargs.get("alpha", 1) != 1 or rule.node.kwargs.get("beta", 1) != 1
    return "whole" if scaled else "sum"


def _added(rule: Rule, users: dict[int, list[tuple[int, int]]]) -> None:
    """Dims of a result to which operand 0 is added, broadcast from the right."""
    rule.bias = 0
    shape, added = rule.out_shape(), rule.shape(0)
    for dim, pairs in users.items():
        added_dim = dim - (len(shape) - len(added))
        if added_dim >= 0 and added[added_dim] == shape[dim]:
            pairs = [*pairs, (0, added_dim)]
        rule.loop("map", pairs, [(0, dim)])


@BOOK.rule("einsum")
def einsum(rule: Rule) -> None:
    """One loop for each letter: a map where the result has it, else a sum. An ellipsis stands for letters."""
    equation = rule.arg(0, "equation").replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    if not arrow:
        letters = sorted(set(inputs) - {",", "."})
        output = "".join(letter for letter in letters if inputs.count(letter) == 1)
        output = ("..." if "..." in inputs else "") + output
    terms = inputs.split(",")
    if any(len(set(term)) != len(term.replace("...", ".")) for term in terms):
        type_opaquely(rule, "a diagonal in einsum")
        return
    rank = max(
        (len(axes) - len(term.replace("...", "")) for term, axes in zip(terms, rule.actual, strict=True)), default=0
    )
    places: dict[str, list[tuple[int, int]]] = {}
    for operand, term in enumerate(terms):
        for dim, label in enumerate(_labels(term, rank, len(rule.actual[operand]))):
            places.setdefault(label, []).append((operand, dim))
    out_labels = _labels(output, rank, len(rule.out_shape()))
    for label, everywhere in places.items():
        size = max(rule.shape(operand)[dim] for operand, dim in everywhere)
        pairs = [(operand, dim) for operand, dim in everywhere if rule.shape(operand)[dim] == size]
        if label in out_labels:
            rule.loop("map", pairs, [(0, out_labels.index(label))])
        else:
            rule.loop("sum", pairs, [])


def _labels(term: str, ellipsis_rank: int, rank: int) -> list[str]:
    """One label per dim; dims under an ellipsis are numbered from the right."""
    if "..." not in term:
        return list(term)
    head, tail = term.split("...")
    inside = rank - len(head) - len(tail)
    return [*head, *(str(ellipsis_rank - inside + k) for k in range(inside)), *tail]


def _reduced(rule: Rule) -> tuple[set[int], bool]:
    rank = len(rule.actual[0])
    dims, keep = rule.named("dim"), bool(rule.named("keepdim", False))
    if dims is None or dims == [] or rank == 0:
        return set(range(rank)), keep
    dims = [dims] if isinstance(dims, int) else dims
    return {rule.wrapped(dim) for dim in dims}, keep


def _reduce(rule: Rule, kind: Kind) -> None:
    gone, keep = _reduced(rule)
    out = 0
    for dim in range(len(rule.actual[0])):
        if dim in gone:
            rule.loop(kind, [(0, dim)], [])
            out += keep
        else:
            rule.loop("map", [(0, dim)], [(k, out) for k in range(len(rule.result_axes))])
            out += 1


@BOOK.rule("sum")
def sum_(rule: Rule) -> None:
    """A sum over dims that are reduced, a map over the others."""
    _reduce(rule, "sum")


@BOOK.rule("mean")
def mean(rule: Rule) -> None:
    """A mean over dims that are reduced, a map over the others."""
    _reduce(rule, "mean")


@BOOK.rule(
    "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean", "std_mean", "all", "any", "prod",
    "logsumexp", "linalg_vector_norm", "norm", "median", "aminmax",
)  # fmt: skip
def reduce_whole(rule: Rule) -> None:
    """A map over dims that stay; those that are reduced are needed whole, as parts cannot be added up."""
    if len(rule.operands) > 1:
        type_opaquely(rule, "no rule for this overload")
        return
    _reduce(rule, "whole")
