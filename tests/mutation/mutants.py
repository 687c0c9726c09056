"""Finds every small fault that can be put into a module: operators, numbers, conditions, statements, keywords.

What only speaks to people (docstrings, messages of errors) or to type checkers is left alone, and so are assertions.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
# Calls whose effect nobody computes with.
TALK = re.compile(r"^(_?log|_?logger|logging|warnings)\.")


@dataclass(frozen=True)
class Mutant:
    """One fault: bytes [start, end) of a file become `text`; `line` is where its statement begins, `at` its own."""

    file: str
    line: int
    start: int
    end: int
    text: str
    at: int

    def apply(self, source: bytes) -> bytes:
        """The file with the fault."""
        return source[: self.start] + self.text.encode() + source[self.end :]

    def lines(self, source: bytes) -> tuple[str, str]:
        """The fault's line without its indentation, as it was and as it becomes."""
        before, after = (x.split(b"\n")[self.at - 1].decode().strip() for x in (source, self.apply(source)))
        return before, after

    def diff(self, source: bytes) -> str:
        """The fault as a unified diff."""
        before, after = (x.decode().splitlines() for x in (source, self.apply(source)))
        return "\n".join(difflib.unified_diff(before, after, self.file, self.file, lineterm="", n=2))


def inside_functions(source: bytes) -> set[int]:
    """Lines that run when a function is called; those of its head (defaults, decorators) run when it is defined."""
    inside = set[int]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside.update(range(node.body[0].lineno, (node.body[-1].end_lineno or 0) + 1))
    return inside


def find(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a module that still parse, in the order of the file."""
    found = []
    for line, start, end, text in _Finder(source).walk(ast.parse(source), 0):
        mutant = Mutant(file, line, start, end, text, source[:start].count(b"\n") + 1)
        changed = mutant.apply(source)
        try:
            ast.parse(changed)
        except SyntaxError:
            continue
        if changed != source:
            found.append(mutant)
    return sorted(found, key=lambda m: (m.start, m.end, m.text))


Change = tuple[int, int, int, str]


class _Finder:
    def __init__(self, source: bytes) -> None:
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def words(self, node: ast.expr | ast.stmt | ast.keyword) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def walk(self, node: ast.AST, line: int) -> Iterator[Change]:
        """Changes in a node and below; line: where the statement around it begins."""
        if isinstance(node, ast.stmt):
            line = node.lineno
            if _silent(node, self.words(node)):
                return
        if isinstance(node, ast.stmt | ast.expr):
            for start, end, text in self.changes(node):
                yield line, start, end, text
        for name, value in ast.iter_fields(node):
            if name == "keywords" and isinstance(value, list):
                value = [k for k in value if k.arg != "strict"]
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params", "exc", "cause", "msg"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not _annotation_alone(node, name):
                    yield from self.walk(child, line)

    def changes(self, node: ast.stmt | ast.expr) -> Iterator[tuple[int, int, str]]:
        start, end = self.span(node)
        match node:
            case ast.Compare(left=left, ops=[operator], comparators=[right]):
                yield from self.between(left, right, *COMPARISONS[type(operator)])
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in ARITHMETIC:
                if not (_text(left) or _text(right)):
                    old, new = ARITHMETIC[type(operator)]
                    yield from self.between(left, right, re.escape(old), new)
            case ast.AugAssign(target=target, op=operator, value=value):
                if type(operator) in ARITHMETIC and not _text(value):
                    old, new = ARITHMETIC[type(operator)]
                    yield from self.between(target, value, re.escape(old) + "=", new + "=")
                yield start, end, "pass"
            case ast.BoolOp(op=operator, values=values):
                old, new = ("and", "or") if isinstance(operator, ast.And) else ("or", "and")
                for left, right in itertools.pairwise(values):
                    yield from self.between(left, right, old, new)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield start, end, self.words(operand)
            case ast.Constant(value=bool(value)):
                yield start, end, str(not value)
            case ast.Constant(value=int(value) | float(value)):
                yield start, end, repr(value + 1)
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                if not isinstance(node, ast.While):
                    yield *self.span(test), f"not ({self.words(test)})"
            case ast.Return(value=ast.expr() as value) if not _falsy(value):
                yield *self.span(value), "None"
            case ast.Expr(value=ast.Call()) | ast.Raise():
                yield start, end, "pass"
            case ast.Break():
                yield start, end, "continue"
            case ast.Continue():
                yield start, end, "break"
            case ast.Call(keywords=keywords):
                for keyword in keywords:
                    if keyword.arg not in (None, "strict"):  # strict=True is an assertion, of zip
                        yield self.without(keyword)

    def between(self, left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[tuple[int, int, str]]:
        """The operator that stands between two operands."""
        after, before = self.span(left)[1], self.span(right)[0]
        pattern = rf"(?<!\w){old}(?!\w)" if old[0].isalpha() else old
        if hit := re.search(pattern, self.source[after:before].decode()):
            yield after + hit.start(), after + hit.end(), new

    def without(self, keyword: ast.keyword) -> tuple[int, int, str]:
        """A call with one keyword less, and the comma after it."""
        start, end = self.span(keyword)
        comma = re.match(rb"\s*,[ ]?", self.source[end:])
        return start, end + (comma.end() if comma else 0), ""


def _silent(node: ast.stmt, words: str) -> bool:
    """Whether a statement is for people or for type checkers only."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom() | ast.Assert():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Expr(value=ast.Call()):
            return bool(TALK.match(words))
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name == "__all__" or bool(re.match(r"^\w+ = (TypeVar|logging\.getLogger)\(", words))
    return False


def _falsy(node: ast.expr) -> bool:
    """None, or False, which is as good as None wherever somebody asks whether it is so."""
    return isinstance(node, ast.Constant) and (node.value is None or node.value is False)


def _text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _annotation_alone(node: ast.AST, field: str) -> bool:
    """A type alias made of unions, as `Place = int | str`."""
    return isinstance(node, ast.Assign) and field == "value" and _is_union(node.value)


def _is_union(node: ast.expr) -> bool:
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)):
        return False
    parts = [node.left, node.right]
    return any(isinstance(p, ast.Constant) and p.value is None for p in parts) or any(
        isinstance(p, ast.Name) and p.id in ("int", "str", "float", "bool", "bytes", "dict", "list") for p in parts
    )
