"""Train the two models that Phalanx carries: the dense `phalanx/assets/tiny` and its mixture of experts, `tiny-moe`.

The text is what every machine with Python has: the sources of the standard library, plus short chats made of its
functions and their docstrings. The result is an ordinary Hugging Face checkpoint (Qwen3 or Qwen3-MoE architecture,
bf16, byte-level BPE tokenizer, ChatML template), small enough to ship and real enough to continue Python code.

    python examples/tiny/train.py --out phalanx/assets/tiny [--steps N]
    python examples/tiny/train.py --moe --out phalanx/assets/tiny-moe [--steps N] [--minutes M]

Seeds are fixed and the tokenizer repeats byte for byte; the text, hence the weights, change with the Python version.
The mixture of experts takes tokenizer and first weights from the dense model in `phalanx/assets/tiny`.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from model import expert_load, loss_of, new_dense, new_moe, write_checkpoint
from text import IM_END, IM_START, SEED, documents, standard_library, token_stream, train_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

DENSE = Path(__file__).parents[2] / "phalanx" / "assets" / "tiny"
STEPS = 3200
TOKENS_PER_STEP = 2048  # at equal tokens: 4096 ended 0.6 nats higher after 0.6 M tokens, 1024 only 0.07 lower
SEQUENCE = 256
LONG_SEQUENCE = 2048  # every LONG_EVERY-th step, so that late positions are trained too
LONG_EVERY = 8
PEAK_LEARNING_RATE = {"dense": 4e-3, "moe": 2e-3}
IMBALANCE_WEIGHT = 0.01
PRINT_EVERY = 100
SAVE_EVERY = 500

# No prompt ends in a blank: the tokenizer keeps the last blank with the word that follows.
SAMPLES = (
    "def __init__(self",
    "def read_lines(path):\n    with open(path) as",
    f"{IM_START}user\nWhat does `read_file` do?{IM_END}\n{IM_START}assistant\n",
)


def validation_rows(stream: torch.Tensor, max_rows: int) -> torch.Tensor:
    """Rows of SEQUENCE + 1 tokens spread evenly over a held-out stream."""
    rows = stream.unfold(0, SEQUENCE + 1, SEQUENCE)
    return rows[torch.linspace(0, len(rows) - 1, min(max_rows, len(rows))).long()]


@torch.inference_mode()
def validation_loss(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Mean cross entropy of held-out rows, nats per token."""
    return sum(loss_of(model, chunk)[0].item() * len(chunk) for chunk in rows.split(8)) / len(rows)


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine down to 2 % of the peak; `progress` runs from 0 to 1."""
    if progress < 0.05:
        return peak * progress / 0.05
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95)))


def train(
    model: PreTrainedModel, stream: torch.Tensor, peak: float, steps: int, seconds: float
) -> Iterator[tuple[int, str]]:
    """AdamW over random crops of `stream` for `steps` steps or, if that comes first, `seconds` seconds.

    The learning rate follows whichever is further on, so it has come down when the time is up.

    Yields:
        After each step the number of steps done, and a line about loss and speed.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(SEED)
    started = time.perf_counter()
    mean_loss = mean_imbalance = 0.0
    for step in range(steps):
        progress = max((step + 1) / steps, (time.perf_counter() - started) / seconds)
        if progress > 1:
            return
        length = LONG_SEQUENCE if step % LONG_EVERY == LONG_EVERY - 1 else SEQUENCE
        starts = torch.randint(len(stream) - length, (TOKENS_PER_STEP // length, 1), generator=generator)
        loss, imbalance = loss_of(model, stream[starts + torch.arange(length + 1)])
        (loss + IMBALANCE_WEIGHT * imbalance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, progress)
        optimizer.step()
        optimizer.zero_grad()
        weight = max(0.01, 1 / (step + 1))  # running means over about 100 steps
        mean_loss += weight * (loss.item() - mean_loss)
        mean_imbalance += weight * (imbalance.item() - mean_imbalance)
        speed = (step + 1) * TOKENS_PER_STEP / (time.perf_counter() - started)
        yield step + 1, f"{progress:4.0%} loss {mean_loss:.3f} imbalance {mean_imbalance:.3f} {speed:.0f} tokens/s"


def show_result(out: Path, stream: torch.Tensor, num_bytes: int) -> None:
    """Load what was written the way a user would; print its size, losses, expert load and greedy continuations."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    file_bytes = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {file_bytes} bytes, {model.num_parameters()} parameters, {model.dtype}")
    rows = validation_rows(stream, max_rows=256)
    nats = validation_loss(model, rows)
    print(f"held out: {nats:.3f} nats per token, {nats / math.log(2) * len(stream) / num_bytes:.3f} bits per byte")
    if isinstance(model, Qwen3MoeForCausalLM):
        for layer, load in enumerate(expert_load(model, rows[:, :-1])):
            relative = load / load.mean()
            print(f"layer {layer}: load of the experts {relative.min():.2f} to {relative.max():.2f} times their mean")
    for prompt in SAMPLES:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=64)[0]  # type: ignore[misc]
        print(f"{'-' * 80}\n{tokenizer.decode(output, skip_special_tokens=False)}")


def main() -> None:
    """Run the whole recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--moe", action="store_true", help="the mixture of experts, not the dense model")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier if this time is over")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)

    training, held_out = standard_library()
    tokenizer = Tokenizer.from_file(str(DENSE / "tokenizer.json")) if arguments.moe else train_tokenizer(training)
    texts = documents(held_out)
    stream, validation = token_stream(tokenizer, documents(training)), token_stream(tokenizer, texts)
    print(f"{len(training + held_out)} files: {len(stream)} training tokens, {len(validation)} held out", flush=True)

    model: PreTrainedModel
    if arguments.moe:
        model = new_moe(tokenizer, Qwen3ForCausalLM.from_pretrained(DENSE, dtype=torch.float32))
    else:
        model = new_dense(tokenizer)
    peak = PEAK_LEARNING_RATE["moe" if arguments.moe else "dense"]
    rows = validation_rows(validation, max_rows=64)
    lowest = math.inf
    for step, line in train(model, stream, peak, arguments.steps, 60 * arguments.minutes):
        if step % PRINT_EVERY == 0:
            print(f"step {step}/{arguments.steps} {line}", flush=True)
        if step % SAVE_EVERY == 0 and (loss := validation_loss(model, rows)) < lowest:
            lowest = loss
            write_checkpoint(model, tokenizer, arguments.out)
            print(f"step {step}/{arguments.steps} held-out loss {loss:.3f}, saved", flush=True)
    if validation_loss(model, rows) < lowest:
        write_checkpoint(model, tokenizer, arguments.out)
    show_result(arguments.out, validation, sum(len(text.encode()) for text in texts))


if __name__ == "__main__":
    main()
