"""One-line mutations of Python: constants, comparisons, indices, lost statements, operands.

Works on the tokens and the syntax tree of a whole source, so that signatures, annotations,
docstrings, imports and messages stay as they are. Knows nothing of sampling or of tests.
"""

import ast
import io
import tokenize
from collections.abc import Iterator

from verification.teeth.c_mutations import Mutation

OPERATORS = {
    "+": ("-", "arithmetic"),
    "-": ("+", "arithmetic"),
    "*": ("+", "arithmetic"),
    "/": ("*", "arithmetic"),
    "//": ("*", "arithmetic"),
    "%": ("//", "arithmetic"),
    "<": ("<=", "comparison"),
    "<=": ("<", "comparison"),
    ">": (">=", "comparison"),
    ">=": (">", "comparison"),
    "==": ("!=", "comparison"),
    "!=": ("==", "comparison"),
    "+=": ("-=", "arithmetic"),
    "-=": ("+=", "arithmetic"),
    "|=": ("&=", "arithmetic"),
    "&=": ("|=", "arithmetic"),
    "|": ("&", "arithmetic"),
    "&": ("|", "arithmetic"),
    "<<": (">>", "arithmetic"),
    ">>": ("<<", "arithmetic"),
    "^": ("|", "arithmetic"),
}
WORDS = {
    "and": ("or", "logic"),
    "or": ("and", "logic"),
    "True": ("False", "constant"),
    "False": ("True", "constant"),
    "min": ("max", "operands"),
    "max": ("min", "operands"),
    "append": ("remove", "operands"),
    "break": ("pass", "deleted"),
    "continue": ("pass", "deleted"),
}
COMMUTING = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr, ast.BitXor)


def mutations_of(source: str) -> Iterator[tuple[int, Mutation]]:
    """Every mutation of a source, with its line, from 0; a line's own text is stripped."""
    tree, lines = ast.parse(source), source.split("\n")
    fixed = _fixed_lines(tree)
    for row, start, end, after, kind in [*_by_token(source), *_by_tree(tree)]:
        if row in fixed:
            continue
        line = lines[row]
        changed = (line[:start] + after + line[end:]).strip()
        if changed != line.strip():
            yield row, Mutation(kind, line.strip(), changed)


def _fixed_lines(tree: ast.AST) -> set[int]:
    """Lines that hold signatures, annotations, docstrings or imports."""
    fixed: set[int] = set()

    def fix(first: int, last: int) -> None:
        fixed.update(range(first - 1, last))

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            fix(first, max(node.lineno, node.body[0].lineno - 1))
        elif isinstance(node, ast.Import | ast.ImportFrom | ast.AnnAssign):
            fix(node.lineno, node.end_lineno)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            fix(node.lineno, node.end_lineno)
        elif isinstance(node, ast.Raise):  # whether, not how it is worded
            fix(node.lineno + 1, node.end_lineno)
        elif isinstance(node, ast.Assert):  # of our own invariants: no test can make one fail
            fix(node.lineno, node.end_lineno)
    return fixed


def _by_token(source: str) -> Iterator[tuple[int, int, int, str, str]]:
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    depth: list[int] = []
    for before, token, behind in zip(tokens, tokens[1:], tokens[2:], strict=False):
        (row, start), (end_row, end) = token.start, token.end
        if row != end_row:
            continue
        place = (row - 1, start, end)
        if token.type == tokenize.NUMBER:
            yield *place, _other_number(token.string), "constant"
        elif token.type == tokenize.NAME and token.string in WORDS:
            if token.line[:start].rstrip().endswith("strict="):
                continue  # zip's check of our own invariant: no test can make it fail
            yield *place, *WORDS[token.string]
        elif token.type == tokenize.NAME and token.string == "not":
            if before.string == "is":
                yield *place, "", "comparison"
            elif behind.string != "in":
                yield *place, "", "logic"
            else:
                yield *place, "", "comparison"
        elif token.type == tokenize.NAME and token.string == "is" and behind.string != "not":
            yield *place, "is not", "comparison"
        elif token.type != tokenize.OP:
            continue
        elif token.string == "[":
            is_index = before.type == tokenize.NAME or before.string in (")", "]")
            depth.append(end if is_index else -1)
        elif token.string == "]" and depth:
            if depth.pop() >= 0 and before.type in (tokenize.NAME, tokenize.NUMBER):
                yield row - 1, start, start, " + 1", "index"
        elif token.string in OPERATORS and _is_binary(before):
            yield *place, *OPERATORS[token.string]


def _by_tree(tree: ast.AST) -> Iterator[tuple[int, int, int, str, str]]:
    for node in ast.walk(tree):
        if getattr(node, "lineno", None) is None or node.lineno != node.end_lineno:
            continue
        place = (node.lineno - 1, node.col_offset, node.end_col_offset)
        if _may_be_left_out(node):
            yield *place, "pass", "deleted"
        elif isinstance(node, ast.BinOp) and not isinstance(node.op, COMMUTING):
            swapped = ast.BinOp(node.right, node.op, node.left)
            yield *place, f"({ast.unparse(swapped)})", "swapped"
        elif _is_call_of_two(node):
            swapped = ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], [])
            yield *place, ast.unparse(swapped), "swapped"


def _is_call_of_two(node: ast.AST) -> bool:
    """A call whose first two arguments may change places; those of min and max always may."""
    if not isinstance(node, ast.Call) or len(node.args) < 2 or node.keywords:
        return False
    return not (isinstance(node.func, ast.Name) and node.func.id in ("min", "max", "isinstance"))


def _may_be_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant | ast.Yield)
    if isinstance(node, ast.Assign):
        return not isinstance(node.targets[0], ast.Name | ast.Tuple)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Delete)


def _is_binary(before: tokenize.TokenInfo) -> bool:
    if before.type == tokenize.NAME:
        return before.string not in ("return", "and", "or", "not", "in", "if", "else", "yield")
    return before.type in (tokenize.NUMBER, tokenize.STRING) or before.string in (")", "]", "}")


def _other_number(token: str) -> str:
    if token.isdigit():
        return str(int(token) + 1)
    try:
        value = float(token)
    except ValueError:  # 0x10, 1_000
        return f"({token} + 1)"
    return "1.0" if value == 0 else f"({token} * 1.01)"
