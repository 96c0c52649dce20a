"""The code the embedded model learns from: the standard library of the running interpreter, as token ids."""

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .vocabulary import end_of_text_id

HELD_OUT_ONE_IN = 40  # of the files, chosen by the hash of their relative path
LARGEST_FILE = 200_000  # bytes; larger ones are tables, not code
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "bad_coding", "lib2to3"}
LONGEST_FUNCTION = 1_500  # characters, for the chat samples


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file: path relative to the standard library, and its text."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids of the corpus, and what the sample generators need to know about it."""

    end: int  # id of <|endoftext|>
    train: np.ndarray  # uint16 [tokens], files separated by <|endoftext|>
    held_out: np.ndarray  # uint16 [tokens]
    words: list[str]  # lower-case words of the code, for names and values
    functions: list[tuple[str, str]]  # (question, source) for chat samples
    ends_line: np.ndarray  # bool [vocab], the token's text ends with a newline
    starts_line_end: np.ndarray  # bool [vocab], the token's text begins with a newline


def is_held_out(path: str) -> bool:
    """Whether the file at this relative path is kept out of training; depends on the path alone."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def standard_library(limit: int | None = None) -> list[SourceFile]:
    """Readable sources of the standard library in order of path; `limit` keeps the first so many (for tests)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[SourceFile] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or path.stat().st_size > LARGEST_FILE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
        if limit is not None and len(files) >= limit:
            break
    return files


def common_words(texts: Iterator[str], count: int = 1500) -> list[str]:
    """The most frequent lower-case words of 3 to 8 letters, in alphabetical order."""
    counter: Counter[str] = Counter()
    for text in texts:
        counter.update(re.findall(r"(?<![a-zA-Z])[a-z]{3,8}(?![a-zA-Z])", text))
    return sorted(word for word, _ in counter.most_common(count))


def documented_functions(files: list[SourceFile]) -> list[tuple[str, str]]:
    """Short top-level functions with a docstring, as (its first line, source)."""
    found: list[tuple[str, str]] = []
    for file in files:
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                source = ast.get_source_segment(file.text, node) or ""
                if 40 < len(source) < LONGEST_FUNCTION:
                    found.append((f"Write a function `{node.name}`: {doc.splitlines()[0]}", source))
    return found


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one uint16 array, each ended by <|endoftext|>."""
    end = np.array([end_of_text_id(tokenizer)], dtype=np.uint16)
    parts: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch(texts):
        parts += [np.array(encoding.ids, dtype=np.uint16), end]
    return np.concatenate(parts)


def line_tables(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Per token id: does its text end with a newline, does it begin with one."""
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())]
    return np.array([t.endswith("\n") for t in texts]), np.array([t.startswith("\n") for t in texts])


def build_corpus(tokenizer: Tokenizer, files: list[SourceFile]) -> Corpus:
    """Tokenize the files and collect words and functions from the training part."""
    train = [f for f in files if not is_held_out(f.path)]
    held = [f for f in files if is_held_out(f.path)] or files[-1:]
    ends, starts = line_tables(tokenizer)
    return Corpus(
        end=end_of_text_id(tokenizer),
        train=tokenize(tokenizer, [f.text for f in train]),
        held_out=tokenize(tokenizer, [f.text for f in held]),
        words=common_words(f.text for f in train),
        functions=documented_functions(train),
        ends_line=ends,
        starts_line_end=starts,
    )
