"""Real text that every machine has: Python's own standard library, and a tokenizer trained on it."""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

# Not the library itself (tests are a separate package on some systems), or tables rather than code.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
END = "<|end|>"  # between files; a completion may stop with it


@dataclass(frozen=True)
class Prompt:
    code: str  # a function, cut off at the start of a line: what the verifier sees
    tokens: list[int]  # the last tokens of its file up to the same point: what the model sees


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: Tensor  # all files in one row of token ids
    prompts: list[Prompt]  # from files that are not in `train`
    files: int

    @property
    def end_token(self) -> int:
        return self.tokenizer.token_to_id(END)


def code_only(source: str) -> str:
    """Without comments and docstrings, in the uniform layout of ast.unparse: a small model learns it sooner."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        documentable = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documentable and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def stdlib_sources(limit: int) -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts)]
    paths.sort()  # the order of a folder is the file system's
    random.Random(0).shuffle(paths)
    sources = []
    for path in paths[:limit]:
        try:
            sources.append(code_only(path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, SyntaxError):
            continue
    if not sources:
        raise RuntimeError(f"no Python sources under {root}: this example reads the standard library as text")
    return sources


def train_tokenizer(sources: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` entries: few sources have fewer merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources, trainer)
    return tokenizer


def cut_points(source: str) -> list[tuple[int, str]]:
    """Where to cut each top-level function of several statements: (offset in source, the function so far).

    The cut is after the first statement and the next line's indent, less its last space: the tokenizer joins
    that one to the word that follows.
    """
    lines = source.splitlines(keepends=True)
    cuts = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or hasattr(node.body[0], "body"):
            continue
        before = "".join(lines[: node.lineno - 1])
        code = "".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "   "
        cuts.append((len(before) + len(code), code))
    return cuts


def load_corpus(vocab_size: int, prompt_length: int, files: int) -> Corpus:
    sources = stdlib_sources(files)
    held_out = sources[: max(6, len(sources) // 10)]
    train = sources[len(held_out) :]
    tokenizer = train_tokenizer(train, vocab_size)
    encodings = tokenizer.encode_batch([source + END for source in train])
    prompts = []
    for source in held_out:
        for offset, code in cut_points(source):
            context = source[max(0, offset - 20 * prompt_length) : offset]
            tokens = tokenizer.encode(context).ids[-prompt_length:]
            if len(tokens) == prompt_length:
                prompts.append(Prompt(code, tokens))
    train_ids = torch.tensor([token for encoding in encodings for token in encoding.ids])
    return Corpus(tokenizer, train_ids, prompts, len(sources))
