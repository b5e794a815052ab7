"""Train the 3.4 M-parameter model that Phalanx carries in `phalanx/assets/tiny`.

The text is what every machine with Python has: the sources of the standard library, plus short chats made of its
functions and their docstrings. The result is an ordinary Hugging Face checkpoint (Qwen3 architecture, bf16, its own
byte-level BPE tokenizer, ChatML template), small enough to ship and real enough to continue Python code.

    python examples/tiny/train.py --out phalanx/assets/tiny [--steps N]

Seeds are fixed and the tokenizer repeats byte for byte; the text, hence the weights, change with the Python version.
"""

import argparse
import ast
import json
import math
import os
import random
import sysconfig
import tempfile
import textwrap
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

SEED = 20
NUM_THREADS = 2
STEPS = 3200
TOKENS_PER_STEP = 2048  # at equal tokens: 4096 ended 0.6 nats higher after 0.6 M tokens, 1024 only 0.07 lower
SEQUENCE = 256
LONG_SEQUENCE = 2048  # every LONG_EVERY-th step, so that late positions are trained too
LONG_EVERY = 8
PEAK_LEARNING_RATE = 4e-3
PRINT_EVERY = 100
VALIDATION_EVERY = 40  # one file in this many is held out
VOCAB_SIZE = 4096
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

# No prompt ends in a blank: the tokenizer keeps the last blank with the word that follows.
SAMPLES = (
    "def __init__(self",
    "def read_lines(path):\n    with open(path) as",
    f"{IM_START}user\nWhat does `read_file` do?{IM_END}\n{IM_START}assistant\n",
)


# ------------------------------------------------------------------------------------------------------ text


def standard_library() -> list[str]:
    """Sources of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            with tokenize.open(path) as file:  # honours the coding cookie
                sources.append(file.read())
    return [source for source in sources if source.strip()]


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


def token_stream(tokenizer: Tokenizer, sources: list[str]) -> torch.Tensor:
    """All documents as one row of token ids, int64, END_OF_TEXT after each."""
    encodings = tokenizer.encode_batch([text + END_OF_TEXT for text in documents(sources)])
    return torch.cat([torch.tensor(encoding.ids) for encoding in encodings])


# ----------------------------------------------------------------------------------------------------- model


def new_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """An untrained model whose heads, KV heads and layers divide by tensor 4 and pipeline 2."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.06,  # about 1 / sqrt(hidden_size); 0.02 is meant for wide models and starts slowly
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    return Qwen3ForCausalLM(config)


def loss_of(model: Qwen3ForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy in nats of `rows` [num_rows, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.inference_mode()
def validation_loss(model: Qwen3ForCausalLM, stream: torch.Tensor, max_rows: int) -> float:
    """Loss over rows of SEQUENCE tokens spread evenly over a held-out stream."""
    rows = stream.unfold(0, SEQUENCE + 1, SEQUENCE)
    rows = rows[torch.linspace(0, len(rows) - 1, min(max_rows, len(rows))).long()]
    losses = [loss_of(model, chunk).item() * len(chunk) for chunk in rows.split(8)]
    return sum(losses) / len(rows)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine down to 2 % of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3ForCausalLM, stream: torch.Tensor, validation: torch.Tensor, steps: int) -> None:
    """AdamW over random crops of `stream`; prints loss and speed every PRINT_EVERY steps."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(SEED)
    started = time.perf_counter()
    recent_loss = 0.0
    for step in range(steps):
        length = LONG_SEQUENCE if step % LONG_EVERY == LONG_EVERY - 1 else SEQUENCE
        starts = torch.randint(len(stream) - length, (TOKENS_PER_STEP // length, 1), generator=generator)
        loss = loss_of(model, stream[starts + torch.arange(length + 1)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        recent_loss += loss.item() / PRINT_EVERY
        if (step + 1) % PRINT_EVERY == 0:
            elapsed_s = time.perf_counter() - started
            speed = (step + 1) * TOKENS_PER_STEP / elapsed_s
            print(
                f"step {step + 1}/{steps} loss {recent_loss:.3f} {speed:.0f} tokens/s"
                f" validation loss {validation_loss(model, validation, max_rows=32):.3f}",
                flush=True,
            )
            recent_loss = 0.0


# ---------------------------------------------------------------------------------------------------- result


def write_checkpoint(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint in bf16, each file replaced whole, so that readers never see half of one."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        eos_token_id=[tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)],
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save(f"{folder}/tokenizer.json", pretty=False)
        Path(folder, "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)  # the weights come out readable by their owner only
            os.replace(path, out / path.name)


def show_result(out: Path, validation: torch.Tensor) -> None:
    """Load what was written the way a user would; print its size, its loss and greedy continuations."""
    model, tokenizer = Qwen3ForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {num_bytes} bytes, {model.num_parameters()} parameters, {model.dtype}")
    print(f"validation loss {validation_loss(model, validation, max_rows=256):.3f} nats per token")
    for prompt in SAMPLES:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=64)[0]  # type: ignore[misc]
        print(f"{'-' * 80}\n{tokenizer.decode(output, skip_special_tokens=False)}")


def main() -> None:
    """Run the whole recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of {TOKENS_PER_STEP} tokens")
    arguments = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)

    numbered = list(enumerate(standard_library()))
    training = [source for number, source in numbered if number % VALIDATION_EVERY]
    held_out = [source for number, source in numbered if number % VALIDATION_EVERY == 0]
    tokenizer = train_tokenizer(training)
    stream, validation = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    print(f"{len(numbered)} files: {len(stream)} training tokens, {len(validation)} held out", flush=True)

    model = new_model(tokenizer)
    train(model, stream, validation, arguments.steps)
    write_checkpoint(model, tokenizer, arguments.out)
    show_result(arguments.out, validation)


if __name__ == "__main__":
    main()
