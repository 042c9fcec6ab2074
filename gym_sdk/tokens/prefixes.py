"""Token lists by their common prefixes: a compressed trie that refers to the lists it was given."""

from __future__ import annotations

from collections.abc import Iterator

from gym_sdk.tokens.calls import CallTokens

__all__ = ["Place", "PrefixTrie", "common_length"]

_CHUNK = 4096  # tokens compared at once: in C, and not far beyond a difference


class Place:
    """A position in the trie: the token list that leads to it from the root.

    The edge from the place above holds the tokens `source[start:end]`. A place stays the same position
    when edges above or below it are split.

    Attributes:
        above: the place before this one; None at the root.
        below: the places after this one by the first token of their edges, in order of arrival.
        depth: tokens from the root to here.
        calls: indices of the calls whose tokens end here; whoever fills the trie writes them down.
    """

    __slots__ = ("above", "below", "calls", "depth", "end", "source", "start")

    def __init__(self, above: Place | None, source: list[int], start: int, end: int) -> None:
        self.above = above
        self.source = source
        self.start = start
        self.end = end
        self.depth: int = end - start + (0 if above is None else above.depth)
        self.below: dict[int, Place] = {}
        self.calls: list[int] = []

    def next_tokens(self, limit: int) -> list[int]:
        """Return up to `limit` tokens that follow from here, along the newest edges."""
        tokens: list[int] = []
        place = self
        while place.below and len(tokens) < limit:
            place = next(reversed(place.below.values()))
            tokens += place.source[place.start : min(place.end, place.start + limit - len(tokens))]
        return tokens


class PrefixTrie:
    """The tokens of model calls, each position of a shared prefix once.

    An edge refers to a stretch of a list that was inserted and copies nothing, so the lists must not change.
    A call that extends another costs as many comparisons as it has new tokens.
    """

    def __init__(self) -> None:
        self.root = Place(None, [], 0, 0)
        self._places: dict[int, tuple[Place, Place]] = {}
        self._alive: list[CallTokens] = []  # an id names an object only as long as it lives

    def insert_call(self, call: CallTokens) -> tuple[Place, Place]:
        """Insert a call, and its ancestors if they are new.

        Returns:
            The places at which its prompt ends and at which its generation ends.
        """
        line: list[CallTokens] = []
        known: CallTokens | None = call
        while known is not None and id(known) not in self._places:
            line.append(known)
            known = known.parent
        place = self.root if known is None else self._places[id(known)][1]
        for member in reversed(line):
            prompt = self.insert(place, member.new_prompt_ids)
            place = self.insert(prompt, member.generation_token_ids)
            self._places[id(member)] = prompt, place
            self._alive.append(member)
        return self._places[id(call)]

    def insert(self, place: Place, tokens: list[int]) -> Place:
        """Return the place that `tokens` lead to from `place`, making it if there is none."""
        position = 0
        while position < len(tokens):
            edge = place.below.get(tokens[position])
            if edge is None:
                fresh = Place(place, tokens, position, len(tokens))
                place.below[tokens[position]] = fresh
                return fresh
            shared = common_length(tokens, position, edge.source, edge.start, edge.end - edge.start)
            position += shared
            place = edge if shared == edge.end - edge.start else _split(edge, shared)
        return place

    def follow(self, place: Place, tokens: list[int]) -> tuple[Place, Place | None, int]:
        """Follow `tokens` from `place` as far as they are in the trie, without inserting them.

        Returns:
            The last place on the way; if the way ends inside an edge, the place below, else None; and how
            many of the tokens are in the trie.
        """
        position = 0
        while position < len(tokens):
            edge = place.below.get(tokens[position])
            if edge is None:
                break
            shared = common_length(tokens, position, edge.source, edge.start, edge.end - edge.start)
            position += shared
            if shared < edge.end - edge.start:
                return place, edge, position
            place = edge
        return place, None, position

    def walk(self) -> Iterator[Place]:
        """Yield all places, each after the one above it."""
        stack = [self.root]
        while stack:
            place = stack.pop()
            yield place
            stack.extend(reversed(place.below.values()))

    def clear(self) -> None:
        """Forget everything now: places refer to each other, and would wait for the garbage collector."""
        for place in list(self.walk()):
            place.below.clear()
        self._places.clear()
        self._alive.clear()


def common_length(left: list[int], left_start: int, right: list[int], right_start: int, limit: int) -> int:
    """Count how many tokens two lists share from two positions on, up to `limit`."""
    limit = min(limit, len(left) - left_start, len(right) - right_start)
    shared, step = 0, min(_CHUNK, limit)
    while shared < limit:
        step = min(step, limit - shared)
        i, j = left_start + shared, right_start + shared
        if left[i : i + step] == right[j : j + step]:
            shared += step
        elif step == 1:
            break
        else:
            step //= 2
    return shared


def _split(edge: Place, length: int) -> Place:
    """Make a place inside an edge, `length` tokens after its start."""
    above = edge.above
    assert above is not None
    middle = Place(above, edge.source, edge.start, edge.start + length)
    above.below[edge.source[edge.start]] = middle
    edge.above = middle
    edge.start += length
    middle.below[edge.source[edge.start]] = edge
    return middle
