"""The text of the tiny models and their tokenizer: the standard library of Python and chats made of its docstrings."""

import ast
import random
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20
VOCAB_SIZE = 4096
VALIDATION_EVERY = 40  # one file in this many is held out
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Not for reading: tests, other people's packages, and `encodings`, which is 1.4 MB of character tables.
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}

# Qwen2's word splitter: an indent keeps its last blank for the word after it, digits stand alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def standard_library() -> tuple[list[str], list[str]]:
    """Sources of the standard library in the order of their paths: those to train on, and those held out."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            with tokenize.open(path) as file:  # honours the coding cookie
                sources.append(file.read())
    numbered = list(enumerate(source for source in sources if source.strip()))
    return (
        [source for number, source in numbered if number % VALIDATION_EVERY],
        [source for number, source in numbered if number % VALIDATION_EVERY == 0],
    )


def chats(source: str) -> Iterator[str]:
    """Short ChatML conversations about the documented functions of one file."""
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for number, node in enumerate(functions):
        docstring = ast.get_docstring(node)
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if not docstring or len(code) > 1200:
            continue
        summary = docstring.split("\n\n")[0].replace("\n", " ")
        signature = f"def {node.name}({ast.unparse(node.args)})"
        user, assistant = (
            (f"What does `{node.name}` do?", summary),
            (f"Complete:\n{signature}:", code),
            (f"Write the docstring of `{signature}`.", docstring),
            (f"Write the function `{node.name}`: {summary}", code),
        )[number % 4]
        yield f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n{assistant}{IM_END}\n"


def documents(sources: list[str]) -> list[str]:
    """The sources and the chats made of them, shuffled."""
    texts = sources + [chat for source in sources for chat in chats(source)]
    random.Random(SEED).shuffle(texts)
    return texts


def train_tokenizer(sources: list[str]) -> Tokenizer:
    """Byte-level BPE with VOCAB_SIZE entries, the special tokens being the first three."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, int64, END_OF_TEXT after each."""
    encodings = tokenizer.encode_batch([text + END_OF_TEXT for text in texts])
    return torch.cat([torch.tensor(encoding.ids) for encoding in encodings])
