"""Chat messages to the text a model was trained on, by the jinja template of its folder.

The template is code of the model's author, the messages are data of a stranger. The template runs in jinja's
sandbox, without attributes of Python objects, files or imports; the messages reach it as plain strings and are never
parsed as a template. Bounds: 256 KiB of template, 1024 messages, 16 Mi characters in and out, 5 s. Output and time
are checked whenever the template yields text, which a loop over messages does. So no message can exhaust the server
through an honest template, but a template written to do harm can (`9 ** 9 ** 9`): take model folders from people you
trust, and render off the event loop.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phalanx.errors import CheckpointError, InvalidRequestError

MAX_TEMPLATE_BYTES = 256 * 2**10
MAX_MESSAGES = 1024
MAX_TEXT_CHARS = 16 * 2**20
MAX_RENDER_S = 5.0
ROLES: Final = ("system", "developer", "user", "assistant", "tool")

# What a template meets at run time in messages it was not written for; jinja does not wrap the errors of expressions.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _Generation(Extension):
    # `{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it is only its body.
    tags = {"generation"}  # noqa: RUF012  (jinja declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja text.
        special_tokens: names the template may use: `bos_token`, `eos_token`, ...

    Raises:
        CheckpointError: the template is over `MAX_TEMPLATE_BYTES` or is not valid jinja.

    Source: environment, filters and functions follow `apply_chat_template` of Hugging Face transformers.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        num_bytes = len(source.encode(errors="surrogatepass"))
        if num_bytes > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"chat template has {num_bytes} bytes; at most {MAX_TEMPLATE_BYTES} are accepted")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        for name in ("lipsum", "cycler", "joiner"):
            del environment.globals[name]
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateSyntaxError, SyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", "?")
            raise CheckpointError(f"chat template, line {line}: {error}; repair or remove it") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, up to where the assistant speaks next.

        Args:
            messages: mappings of exactly `role`, one of `ROLES`, and `content`, a string.

        Raises:
            InvalidRequestError: a message of another form, the template refuses the conversation, or a bound is hit.
        """
        data = _checked(messages)
        deadline = time.monotonic() + MAX_RENDER_S
        parts, num_chars = [], 0
        try:
            for part in self._template.generate(
                messages=data, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            ):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_TEXT_CHARS:
                    raise InvalidRequestError(f"chat template makes over {MAX_TEXT_CHARS} characters; send less")
                if time.monotonic() > deadline:
                    raise InvalidRequestError(f"chat template runs for over {MAX_RENDER_S:g} s; send fewer messages")
        except _RENDER_ERRORS as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from error
        return "".join(parts)


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError(f"messages has {len(messages)} entries; 1 to {MAX_MESSAGES} are allowed")
    num_chars = 0
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidRequestError(f"messages[{i}] must have exactly the keys 'role' and 'content'")
        if message["role"] not in ROLES:
            raise InvalidRequestError(f"messages[{i}].role ({message['role']!r:.80}) must be one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise InvalidRequestError(
                f"messages[{i}].content must be a string, got {type(message['content']).__name__}; send text only"
            )
        num_chars += len(message["content"])
    if num_chars > MAX_TEXT_CHARS:
        raise InvalidRequestError(f"messages have {num_chars} characters; at most {MAX_TEXT_CHARS} are accepted")
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in messages]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    # The one look at a wall clock: the ids made from it are journaled, so a resumed job keeps its date.
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes <, >, & and ' for HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
