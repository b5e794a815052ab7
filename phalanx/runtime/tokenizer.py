"""Text and chat messages to token ids, and back, as the files of a model folder say.

tokenizer.json         the tokenizer itself; without it requests carry token ids
tokenizer_config.json  names of special tokens, add_bos_token / add_eos_token, chat template (optional)
chat_template.jinja    chat template; wins over the one in tokenizer_config.json (optional)
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import tokenizers

from phalanx.errors import CheckpointError, InvalidRequestError
from phalanx.runtime.chat_template import MAX_TEXT_CHARS, ChatTemplate
from phalanx.runtime.detokenize import PieceTable, decode_rule

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class Tokenizer:
    """The tokenizer of one model; immutable, safe to share between threads.

    Attributes:
        vocab_size: ids are below it; the model's own vocabulary may be padded beyond.
        eos_token_ids: id of the `eos_token` of tokenizer_config.json, or empty.
        fingerprint: digest of everything that decides ids and text.
        chat_template: None if the folder has none.
    """

    def __init__(self, definition: bytes, config: Mapping[str, Any], chat_template: str | None) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(definition)
        except ValueError as error:
            raise CheckpointError(f"tokenizer.json cannot be read: {error}; fetch it again") from error
        # A definition may carry training settings that would cut or pad prompts without a word.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special_tokens = _special_tokens(config)
        bos_token_ids = self._ids_of(special_tokens.get("bos_token"))
        self.eos_token_ids = self._ids_of(special_tokens.get("eos_token"))
        # tokenizer.json adds its own ends, or leaves them to these keys, as DeepSeek does; a false key takes none away.
        own_ends = self._backend.encode("", add_special_tokens=True).ids
        self._prefix = [i for i in bos_token_ids if config.get("add_bos_token") and i not in own_ends]
        self._suffix = [i for i in self.eos_token_ids if config.get("add_eos_token") and i not in own_ends]
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, special_tokens)
        self.fingerprint = _fingerprint(definition, chat_template, special_tokens, self._prefix, self._suffix)
        decoder = self._backend.decoder
        rule = decode_rule(None if decoder is None else json.loads(decoder.__getstate__()))
        added = self._backend.get_added_tokens_decoder().values()
        special = frozenset(token.content for token in added if token.special)
        self._pieces = {skip: PieceTable(rule, self._token_of, special if skip else ()) for skip in (False, True)}

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer | None":
        """The tokenizer of a model folder; None if it has no tokenizer.json.

        Raises:
            CheckpointError: a file is damaged, or the chat template or decoder is not supported.
        """
        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            return None
        config = _read_config(folder / "tokenizer_config.json")
        template = _named_template(config.get("chat_template"))
        if (folder / "chat_template.jinja").is_file():
            try:
                template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"chat_template.jinja is not UTF-8: {error}; fetch it again") from error
        return cls((folder / "tokenizer.json").read_bytes(), config, template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens spelled in it become their ids.

        Raises:
            InvalidRequestError: over `MAX_TEXT_CHARS`, or characters that are no Unicode text (lone surrogates).
        """
        if len(text) > MAX_TEXT_CHARS:
            raise InvalidRequestError(f"text has {len(text)} characters; at most {MAX_TEXT_CHARS} are accepted")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"text[{error.start}] ({text[error.start]!a}) is a lone surrogate; send valid Unicode"
            ) from error
        token_ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return [*self._prefix, *token_ids, *self._suffix] if add_special_tokens else token_ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks next; see `ChatTemplate.render` for the form.

        Raises:
            InvalidRequestError: the folder has no chat template, the messages do not fit it, or no ids result.
        """
        if self.chat_template is None:
            raise InvalidRequestError("this model has no chat template; send a text or prompt_token_ids")
        token_ids = self.encode(self.chat_template.render(messages), add_special_tokens=False)
        if not token_ids:
            raise InvalidRequestError("the chat template makes no tokens of these messages; send some content")
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; unknown ids add nothing, invalid UTF-8 becomes U+FFFD."""
        known = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_size]
        text: str = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def pieces(self, skip_special_tokens: bool) -> PieceTable:
        """What each id adds to a text, for `Detokenizer`."""
        return self._pieces[skip_special_tokens]

    def _token_of(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocab_size:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def _ids_of(self, token: str | None) -> tuple[int, ...]:
        token_id = None if token is None else self._backend.token_to_id(token)
        return () if token_id is None else (token_id,)


def encode_prompt(tokenizer: Tokenizer | None, prompt: Prompt) -> list[int]:
    """Ids of a prompt in any of its forms: a text, a list of ids (taken as they are), a list of chat messages.

    Raises:
        InvalidRequestError: text without a tokenizer, no ids result, or `Tokenizer.encode` / `encode_chat` refuse.
    """
    if not isinstance(prompt, Sequence):
        raise InvalidRequestError(f"prompt ({type(prompt).__name__}) must be a text, a list of ids, or of messages")
    is_chat = len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if not isinstance(prompt, str) and not is_chat:
        return list(cast(Sequence[int], prompt))
    if tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer.json; send prompt_token_ids")
    if not isinstance(prompt, str):
        return tokenizer.encode_chat(cast(Sequence[Mapping[str, str]], prompt))
    token_ids = tokenizer.encode(prompt)
    if not token_ids:
        raise InvalidRequestError(f"the prompt text ({prompt!r:.80}) makes no tokens; send some text")
    return token_ids


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}; fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path.name} holds a {type(config).__name__}, not an object; fetch it again")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    # A token is written as its text, or as an object with the text under "content".
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _named_template(template: object) -> str | None:
    # A folder may hold several, as a list of {name, template}.
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _fingerprint(definition: bytes, *rest: object) -> str:
    digest = blake2b(definition, digest_size=16)
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()
