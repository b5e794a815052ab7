"""The flags of `generate` and `submit`: prompt, sampling, stopping."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from phalanx.runtime.sampling_params import SamplingParams

NUMBERS: Mapping[str, tuple[type, str]] = {
    "max_tokens": (int, "longest output; default: up to the model's limit"),
    "min_tokens": (int, "no stop before this many"),
    "temperature": (float, "0 = greedy"),
    "top_k": (int, "keep the k likeliest; 0 = all"),
    "top_p": (float, "keep the smallest set of this probability"),
    "min_p": (float, "drop what is less likely than this part of the likeliest"),
    "repetition_penalty": (float, "divides the logits of ids seen so far; 1 = off"),
    "presence_penalty": (float, "subtracted once per id of the output"),
    "frequency_penalty": (float, "subtracted per occurrence in the output"),
    "seed": (int, "the same seed gives the same answer; default: drawn"),
    "n": (int, "independent answers"),
    "task": (int, "task of a model with task-level routing; default 0"),
    "logprobs": (int, "log-probabilities of this many likeliest tokens (with --json)"),
}
"""Field of `SamplingParams` -> (type, help); its range is checked there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PROMPT and all flags."""
    parser.add_argument("prompt", metavar="PROMPT", help="text, or - to read it from stdin")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message, for the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat; implies --chat")
    sampling = parser.add_argument_group("sampling")
    for name, (kind, line) in NUMBERS.items():
        flag = "-n" if name == "n" else "--" + name.replace("_", "-")
        sampling.add_argument(flag, type=kind, dest=name, metavar="N" if kind is int else "X", help=line)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="ends the output; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", help="the model's end token does not end the output")
    parser.add_argument("--request-id", metavar="ID", help="name of the job; default: drawn")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="the job ends after this long")
    parser.add_argument("--priority", type=int, default=0, metavar="N", help="smaller runs first; default 0")


def request(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Client.generate` and `Client.submit`.

    Raises:
        InvalidRequestError: a value outside its range, named with its limit.
    """
    return {
        "prompt": _prompt(arguments),
        "params": _params(arguments),
        "request_id": arguments.request_id,
        "deadline_s": arguments.deadline,
        "priority": arguments.priority,
    }


def _prompt(arguments: argparse.Namespace) -> str | Sequence[Mapping[str, str]]:
    text: str = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not arguments.chat and arguments.system is None:
        return text
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [*system, {"role": "user", "content": text}]


def _params(arguments: argparse.Namespace) -> SamplingParams:
    given = {name: getattr(arguments, name) for name in NUMBERS if getattr(arguments, name) is not None}
    return SamplingParams(**given, stop=tuple(arguments.stop or ()), ignore_eos=arguments.ignore_eos)
