"""A reward that Python itself verifies: how far its parser gets in a completion, and how much compiles."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings

ENOUGH = 8  # distinct lexemes for the full reward
LEXEMES = {tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING}  # no comments, no layout


def parse(code: str) -> tuple[ast.Module | None, tuple[int, int]]:
    """The syntax tree, or None and the (line, column) at which the parser gave up."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sampled code warns about everything
            return ast.parse(code), (0, 0)
    except SyntaxError as error:
        return None, (error.lineno or 1, max((error.offset or 1) - 1, 0))
    except (ValueError, RecursionError, MemoryError):
        return None, (1, 0)


def has_effect(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom))
    return not isinstance(statement, ast.Pass)


def lines_with_effect(tree: ast.Module) -> set[int]:
    """Of a compound statement the header alone: its body speaks for itself."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and has_effect(node):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            lines.update(range(node.lineno, max(end, node.lineno) + 1))
    return lines


def reward(prompt: str, completion: str) -> float:
    """From 0 to 1: half for what the parser reads before its first error, half for the lines that compile.

    The prompt ends with the indent of the line that the completion begins. Both halves count the completion's
    distinct lexemes: repetition, comments and blank lines earn nothing, and a string is one lexeme whatever
    it says. Statements without effect (`pass`, bare names, constants) earn nothing in the second half.
    """
    code = prompt + completion
    first = prompt.count("\n") + 1
    tree, error = parse(code)
    compiled: set[int] = set()
    lines = code.split("\n")
    for kept in range(len(lines), first - 1, -1):  # the longest prefix of lines that compiles
        prefix, _ = parse("\n".join(lines[:kept]) + "\n")
        if prefix is not None:
            compiled = lines_with_effect(prefix)
            break
    read: set[str] = set()
    earned: set[str] = set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.start[0] < first or token.type not in LEXEMES:
                continue
            if tree is not None or token.end <= error:
                read.add(token.string)
            if token.start[0] in compiled:
                earned.add(token.string)
    except (tokenize.TokenError, SyntaxError):
        pass  # what came before is counted
    return 0.5 * min(1.0, len(read) / ENOUGH) + 0.5 * min(1.0, len(earned) / ENOUGH)
