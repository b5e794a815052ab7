"""The growing output of one choice: ids, log-probabilities, text; and what a reader at any position is still missing.

    position      0    1    2    3         index into the output's ids
    ids         | a  | b  | c  |
    offsets     0    3    3    7           UTF-8 bytes of text that are certain after so many ids

Text is decided id by id, so it depends on the ids alone and not on how they came in rows: `offsets[p]` is the length
of E(ids[:p]), text before it never changes, and a reader that holds p ids holds exactly that text. Withheld: what the
detokenizer is not certain of, and the longest end of the text that could become a stop string.
"""

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from phalanx.errors import InvalidRequestError, PhalanxError
from phalanx.runtime.detokenize import Detokenizer, HasPieces
from phalanx.runtime.frames import FinishReason, TokenLogprobs
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.stop_strings import START, StopStrings

MAX_DELTA_TOKENS = 4096


class OutputError(PhalanxError):
    """An engine's row does not continue the output: a gap, or log-probabilities that do not go with the ids."""


class Delta(NamedTuple):
    """What one append added, or what a reader is missing.

    Attributes:
        first_position: index of `token_ids[0]` in the output.
        text_delta: goes after the first `text_offset` UTF-8 bytes of the text.
        logprobs: one per id; None = not asked for.
        finish: set on the last delta of a choice.
        stop_match: the stop string that ended the text, with finish = "stop".
    """

    first_position: int
    token_ids: Sequence[int]
    text_delta: str
    text_offset: int
    logprobs: Sequence[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    stop_match: str | None = None


class ChoiceOutput:
    """One choice, from its first id to its finish; sans-IO.

    Args:
        detokenizer: fresh, used by this output alone; None = no text.
        stops: stop strings of the request; None = none.

    Attributes:
        token_ids: u32, so `tobytes()` is the packed form of `Place.outputs` on little-endian machines; read only.
        logprobs: one per id, or empty when not asked for; read only.
        finish, stop_match: as in `Delta`, None while it runs.
    """

    __slots__ = (
        "_detokenizer",
        "_held",
        "_offsets",
        "_state",
        "_stops",
        "_utf8",
        "finish",
        "logprobs",
        "stop_match",
        "token_ids",
    )

    def __init__(self, detokenizer: Detokenizer | None = None, stops: StopStrings | None = None) -> None:
        self.token_ids = array("I")
        self.logprobs: list[TokenLogprobs] = []
        self.finish: FinishReason | None = None
        self.stop_match: str | None = None
        self._detokenizer = detokenizer
        self._utf8 = bytearray()
        self._offsets = array("Q", [0])
        self._stops = stops
        self._state = START
        self._held = ""  # the end of the text that may become a stop string; its length is the state's depth

    @property
    def text(self) -> str:
        """The certain text so far, all of it once finished."""
        return self._utf8.decode()

    def append(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        finish: FinishReason | None = None,
    ) -> Delta:
        """Add ids; those after a stop string, or after the finish, are dropped and the delta is without them.

        Args:
            token_ids: with finish = "stop" the last one is the stop id, which adds no text.
            logprobs: one per id; for all rows of a choice or for none.
            finish: the engine's reason; "stop" wherever a stop string is found.

        Raises:
            OutputError: log-probabilities do not go with the ids.
        """
        first, text_offset = len(self.token_ids), len(self._utf8)
        if self.finish is not None:
            return Delta(first, (), "", text_offset)
        self._check_logprobs(token_ids, logprobs)
        num_text = len(token_ids) - (finish == "stop")
        num_kept = 0
        for token_id in token_ids:
            if num_kept < num_text and self._detokenizer is not None:
                self._emit(self._detokenizer.push(token_id))
            num_kept += 1
            self.token_ids.append(token_id)
            self._offsets.append(len(self._utf8))
            if self.stop_match is not None:
                break
        if num_kept < len(token_ids):
            token_ids, logprobs = token_ids[:num_kept], logprobs and logprobs[:num_kept]
        if logprobs:
            self.logprobs.extend(logprobs)
        if finish is not None or self.stop_match is not None:
            self._end(finish, num_kept)
        text = self._utf8[text_offset:].decode()
        return Delta(first, token_ids, text, text_offset, logprobs, self.finish, self.stop_match)

    def accept(
        self,
        first_position: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        finish: FinishReason | None = None,
    ) -> Delta:
        """`append` of a row that may repeat ids already here: what is here wins, only the rest is added.

        Raises:
            OutputError: ids between the output and the row are missing, or the row ends the output before its end.
        """
        num_known = len(self.token_ids) - first_position
        if self.finish is not None:
            return self.append(())
        if num_known < 0:
            raise OutputError(f"row starts at position {first_position}, the output ends at {len(self.token_ids)}")
        if num_known > len(token_ids) and finish is not None:
            end = first_position + len(token_ids)
            raise OutputError(f"row finishes ({finish}) at position {end}, the output has {len(self.token_ids)} ids")
        if not num_known:
            return self.append(token_ids, logprobs, finish)
        if num_known >= len(token_ids) and finish is None:
            return Delta(len(self.token_ids), (), "", len(self._utf8))
        return self.append(token_ids[num_known:], logprobs and logprobs[num_known:], finish)

    def restore(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        finish: FinishReason | None = None,
        stop_match: str | None = None,
    ) -> Delta:
        """`append` of what a finished or running output held, for replay of a journal; gives the same text."""
        # After a stop string the last id is text, not a stop id: let the string be found again.
        return self.append(token_ids, logprobs, finish if stop_match is None else "length")

    def deltas_from(self, position: int, upto: int | None = None) -> list[Delta]:
        """What a reader that holds `position` ids is missing, at most `MAX_DELTA_TOKENS` ids each; empty if nothing.

        Args:
            position: how many ids the reader holds.
            upto: as if the output had only so many ids and no finish (what is durable); None = all, and the finish.

        Raises:
            InvalidRequestError: `position` is past the end.

        Cost: O(what is returned).
        """
        end = len(self.token_ids) if upto is None else min(upto, len(self.token_ids))
        if not 0 <= position <= end:
            raise InvalidRequestError(f"position ({position}) must be from 0 to {end}, the ids there are")
        deltas = []
        for first in range(position, end, MAX_DELTA_TOKENS):
            last = min(first + MAX_DELTA_TOKENS, end)
            logprobs = self.logprobs[first:last] if self.logprobs else None
            text = self._utf8[self._offsets[first] : self._offsets[last]].decode()
            deltas.append(Delta(first, self.token_ids[first:last].tolist(), text, self._offsets[first], logprobs))
        if upto is None and self.finish is not None:
            tail = deltas.pop() if deltas else Delta(end, (), "", self._offsets[end])
            text = self._utf8[tail.text_offset :].decode()
            deltas.append(tail._replace(text_delta=text, finish=self.finish, stop_match=self.stop_match))
        return deltas

    def check(self) -> None:
        """Assert the invariants between ids, log-probabilities, offsets and text; O(n)."""
        offsets = self._offsets
        assert len(offsets) == len(self.token_ids) + 1
        assert all(a <= b for a, b in pairwise(offsets))
        assert offsets[-1] <= len(self._utf8)
        assert len(self.logprobs) in (0, len(self.token_ids))
        assert self.stop_match is None or self.finish == "stop"
        if self._stops is not None:
            assert self._stops.scan(START, self.text).match is None
            assert len(self._held) == (0 if self.finish else self._stops.depths[self._state])

    def _emit(self, text: str) -> None:
        if not text:
            return
        if self._stops is not None:
            scan = self._stops.scan(self._state, text)
            self._state = scan.state
            text = self._held + text[: scan.end]
            num_held = self._stops.depths[scan.state] if scan.match is None else len(scan.match)
            cut = len(text) - num_held
            text, self._held = text[:cut], "" if scan.match is not None else text[cut:]
            self.stop_match = scan.match
        self._utf8 += text.encode()

    def _end(self, finish: FinishReason | None, num_new: int) -> None:
        if self.stop_match is None and self._detokenizer is not None:
            self._emit(self._detokenizer.flush())
        self._utf8 += self._held.encode()
        self._held = ""
        if num_new:
            self._offsets[-1] = len(self._utf8)
        self.finish = finish if self.stop_match is None else "stop"

    def _check_logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> None:
        num_logprobs = len(self.logprobs) + len(logprobs or ())
        if num_logprobs and num_logprobs != len(self.token_ids) + len(token_ids):
            raise OutputError(
                f"{num_logprobs} log-probabilities for {len(self.token_ids) + len(token_ids)} ids; "
                "every row of a choice carries them, or none"
            )


def choice_outputs(tokenizer: HasPieces | None, params: SamplingParams) -> list[ChoiceOutput]:
    """The `params.n` empty outputs of a request; without a tokenizer they stay without text."""
    if tokenizer is None:
        return [ChoiceOutput() for _ in range(params.n)]
    stops = StopStrings(params.stop) if params.stop else None
    return [ChoiceOutput(Detokenizer(tokenizer, params.skip_special_tokens), stops) for _ in range(params.n)]
