"""One-line mutations of C and CUDA: constants, comparisons, indices, lost statements, operands.

Works on tokens of single lines as clang-format lays them out (a binary operator has a space on both
sides, a pointer's star has not), so it needs no parser; a mutation that does not compile is thrown
away by who builds it. Knows nothing of sampling or of tests.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

TOKEN = re.compile(
    r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\''  # texts, left alone
    r"|0[xX][0-9a-fA-F]+[uUlL]*|\d+\.\d*(?:[eE][+-]?\d+)?[fF]?|\d+[uUlL]*"
    r"|[A-Za-z_]\w*"
    r"|<<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|."
)
TEXTS = re.compile(r'"(?:\\.|[^"\\])*"')
OPERATORS = {
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "%": "/",
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "&&": "||",
    "||": "&&",
    "<<": ">>",
    ">>": "<<",
    "&": "|",
    "|": "&",
    "^": "|",
    "+=": "-=",
    "-=": "+=",
    "*=": "+=",
    "|=": "&=",
    "&=": "|=",
    "<<=": ">>=",
    ">>=": "<<=",
}
KINDS = {"<": "comparison", ">": "comparison", "<=": "comparison", ">=": "comparison"} | {
    "==": "comparison",
    "!=": "comparison",
    "&&": "logic",
    "||": "logic",
}
NO_STATEMENT = re.compile(
    r"(return|goto|case|default|typedef|enum|struct|static|extern|const|unsigned|else|do|template|using"
    r"|__shared__|constexpr|asm|alignas)\b"
)
DECLARATION = re.compile(r"[A-Za-z_]\w*(?:\s+\**|\s*\*+\s*)[A-Za-z_]\w*\s*(?:=|;|\[|,|\{)")
# Two names before a parenthesis: a function is declared, or an object made. And a kernel's launch,
# without which its arguments are unused, which does not compile.
PROTOTYPE = re.compile(r"[A-Za-z_]\w*[\s*&]+[A-Za-z_]\w*\(|.*<<<")
SIMPLE = r"[A-Za-z_][\w.]*(?:->\w+)*(?:\[\w+\])?"
SWAPPABLE = re.compile(rf"(?<![\w.)\]>-])({SIMPLE}) ([-/%]|<<|>>|<|>) ({SIMPLE})(?![\w.(\[]|->)")
# What a device computes does not depend on these: how many blocks the compiler makes room for,
# and a launch's own shared memory where the kernel has none.
HINTS = re.compile(r"__launch_bounds__\([^)]*\)|(?<=, )0(?=, \(cudaStream_t\))")
# An array's sizes stand before its values: one longer, it holds a value more, which nobody reads.
ARRAY = re.compile(
    r"(?:(?:alignas\([^)]*\)|__shared__|extern|static|const|constexpr|unsigned)\s+)*"
    r"(?!(?:return|else|delete)\b)[A-Za-z_][\w:]*(?:<[^;=]*>)?[\s*&]+[A-Za-z_]\w*\["
)
ARGUMENTS = re.compile(rf"(?<=[\w](?=\())\(({SIMPLE}), ({SIMPLE})(?=[,)])")


@dataclass(frozen=True)
class Mutation:
    """A line, stripped, and what it becomes."""

    kind: str
    before: str
    after: str


def mutations(line: str, can_delete: bool) -> Iterator[Mutation]:
    """Every mutation of one line.

    Args:
        line: stripped, without its comment.
        can_delete: whether it begins a statement.
    """
    for start, end, after, kind in _replacements(line):
        yield Mutation(kind, line, line[:start] + after + line[end:])
    bare = TEXTS.sub(lambda match: "\0" * len(match[0]), line)  # nothing in a text is swapped
    for match in SWAPPABLE.finditer(bare):
        left, operator, right = match.groups()
        if left != right:
            after = f"{right} {operator} {left}"
            yield Mutation("swapped", line, line[: match.start()] + after + line[match.end() :])
    for match in ARGUMENTS.finditer(bare):
        first, second = match.groups()
        if first != second:
            after = f"({second}, {first}"
            yield Mutation("swapped", line, line[: match.start()] + after + line[match.end() :])
    if can_delete and is_statement(line):
        yield Mutation("deleted", line, "(void)0;")


def is_statement(line: str) -> bool:
    """Whether a line is one whole statement that may be left out and leave a program."""
    if not line.endswith(";") or line.startswith(("}", "{", "#", "for", "(void)0")):
        return False
    if line.count("(") != line.count(")") or line.count("{") != line.count("}"):
        return False
    return not any(form.match(line) for form in (NO_STATEMENT, DECLARATION, PROTOTYPE))


def _replacements(line: str) -> Iterator[tuple[int, int, str, str]]:
    opened: list[int] = []  # where the indices around this token begin
    hints = [range(*found.span()) for found in HINTS.finditer(line)]
    end_of_sizes = len(line.partition(" = ")[0]) if ARRAY.match(line) else 0
    for match in TOKEN.finditer(line):
        token, (start, end) = match[0], match.span()
        is_longer = bool(opened) and start < end_of_sizes  # what only makes an array longer
        if token == "[":
            opened.append(end)
        elif token == "]" and opened:
            inner = line[opened.pop() : start].strip()
            is_none = is_longer or inner[:1] in ("&", "=")  # a size; what a lambda captures
            if inner and not is_none and not re.fullmatch(r"[A-Z0-9_ +*/-]+", inner):
                yield start, start, " + 1", "index"
        elif token[0].isdigit() and (is_longer or any(start in hint for hint in hints)):
            continue
        elif token[0].isdigit():
            yield start, end, _other_number(token), "constant"
        elif token in OPERATORS and line[start - 1 : start] == " " and line[end : end + 1] == " ":
            yield start, end, OPERATORS[token], KINDS.get(token, "arithmetic")
        elif token == "!" and line[end : end + 1] not in ("=", ""):
            yield start, end, "", "logic"


def _other_number(token: str) -> str:
    digits = token.rstrip("uUlL")
    suffix = token[len(digits) :]
    if digits[:2].lower() == "0x":
        return f"{int(digits, 16) ^ 1:#x}{suffix}"
    if digits.isdigit():
        return f"{int(digits) + 1}{suffix}"
    value = float(digits.rstrip("fF"))
    f = "f" if digits[-1] in "fF" else ""
    return f"1.0{f}" if value == 0 else f"({token} * 1.01{f})"


def mutable_lines(text: str) -> Iterator[tuple[str, int, bool]]:
    """Lines of a source that do something: (stripped, equal lines before it, begins a statement).

    Left out: comments, preprocessor, includes, static assertions, and what has a comment behind it
    only as to the comment, which a mutation drops.
    """
    seen: dict[str, int] = {}
    previous_ends = True
    in_comment = False
    for raw in text.split("\n"):
        line = raw.strip()
        occurrence = seen.get(line, 0)
        seen[line] = occurrence + 1
        if in_comment or line.startswith("/*"):
            in_comment = "*/" not in line
            continue
        if not line or line.startswith(("//", "#", "_Static_assert", "static_assert")):
            continue
        code = line.split("//")[0].rstrip()
        yield line, occurrence, previous_ends
        previous_ends = code.endswith((";", "{", "}", ":", ")"))
