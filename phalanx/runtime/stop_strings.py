"""Stop strings in a text that grows: found when their last character arrives, held back while they may still come."""

from collections.abc import Sequence
from typing import Final, NamedTuple

START: Final = 0


class Scan(NamedTuple):
    """State after reading `end` characters; `match` ends there, None = no stop string yet."""

    state: int
    match: str | None
    end: int


class StopStrings:
    """An automaton that finds the first stop string of a text, read piece by piece; shared by all choices of a request.

    A state is the longest end of the text that begins a stop string; `depths[state]` is its length. The match is the
    one that ends first, of those the longest: the same one however the text is cut.

    Cost: built in O(total length), then O(1) amortised per character.
    Source: Aho, Corasick, "Efficient string matching" (CACM 1975).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.depths = [0]
        self._matches: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        for stop in stops:
            state = START
            for depth, char in enumerate(stop, 1):
                if char not in self._next[state]:
                    self._next[state][char] = len(self.depths)
                    self.depths.append(depth)
                    self._matches.append(None)
                    self._next.append({})
                state = self._next[state][char]
            self._matches[state] = stop
        self._first_chars = frozenset(self._next[START])
        self._link()

    def _link(self) -> None:
        # Breadth first: the state to fall back to, the longest proper end that also begins a stop string, is shallower.
        self._fallback = [START] * len(self.depths)
        queue = list(self._next[START].values())
        for state in queue:
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                self._matches[child] = self._matches[child] or self._matches[self._fallback[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while char not in self._next[state]:
            if state == START:
                return START
            state = self._fallback[state]
        return self._next[state][char]

    def scan(self, state: int, text: str) -> Scan:
        """Read on from a state, to the end of the text or of the first match."""
        if state == START and self._first_chars.isdisjoint(text):
            return Scan(START, None, len(text))
        for end, char in enumerate(text, 1):
            state = self.step(state, char)
            match = self._matches[state]
            if match is not None:
                return Scan(state, match, end)
        return Scan(state, None, len(text))
