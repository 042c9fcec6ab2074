"""What became of the tokens of a rollout: rows, what is trained, and where its prompts left their history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gym_sdk.tokens.calls import CallTokens
from gym_sdk.tokens.prefixes import Place, PrefixTrie
from gym_sdk.tokens.tree import TokenTree

__all__ = ["UNREPORTED", "Fork", "TokenReport"]

UNREPORTED = "not reported by the server"
_SHOWN = 8  # tokens on each side of a fork

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Fork:
    """A call whose prompt neither extends an earlier row to its end nor repeats an earlier prompt.

    Attributes:
        call: index of the call.
        reason: why, as the server reported it; else `UNREPORTED`.
        diverged_at: position in the prompt from which on it differs from the earlier row that it shares most
            tokens with. The prompt's length if it ends inside that row.
        shared: up to 8 token ids before that position.
        expected: up to 8 token ids with which the earlier row goes on.
        found: up to 8 token ids with which the prompt goes on.
        expected_text: `expected` decoded, if there was a decoder.
        found_text: `found` decoded, if there was a decoder.
    """

    call: int
    reason: str
    diverged_at: int
    shared: list[int]
    expected: list[int]
    found: list[int]
    expected_text: str | None = None
    found_text: str | None = None

    @property
    def reported(self) -> bool:
        """Whether the server said that it forks."""
        return self.reason != UNREPORTED

    def __str__(self) -> str:
        expected = self.expected if self.expected_text is None else repr(self.expected_text)
        found = self.found if self.found_text is None else repr(self.found_text)
        return (
            f"call {self.call} forks at token {self.diverged_at} ({self.reason}): "
            f"expected {expected}, found {found}"
        )


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What became of the tokens of a rollout's model calls.

    Attributes:
        calls: model calls.
        sequences: training rows, abandoned ones included.
        duplicates: calls that repeat the prompt and generation of another one, and are not trained again.
        abandoned: generations that the rollout did not go on from (see `TokenTree`).
        forks: the calls that left their history, in order of arrival. Sending a prompt again is no fork. A
            fork that the server reported is not listed if the tokens extend an earlier row all the same.
        trained_tokens: tokens that carry loss.
        total_tokens: tokens of all rows.
        generated_tokens: tokens that were sampled, duplicates included.
        unparsed_calls: pieces of tool-call markup that did not parse and stayed text.
    """

    calls: int
    sequences: int
    duplicates: int
    abandoned: int
    forks: list[Fork] = field(default_factory=list)
    trained_tokens: int = 0
    total_tokens: int = 0
    generated_tokens: int = 0
    unparsed_calls: int = 0

    @classmethod
    def of(
        cls,
        calls: Sequence[CallTokens],
        *,
        reasons: Sequence[str | None] = (),
        unparsed_calls: int = 0,
        decode: Decode | None = None,
    ) -> TokenReport:
        """Report on the model calls of one rollout.

        Args:
            calls: in order of arrival.
            reasons: the server's reason for a fork, for each call; None where it reported none. Calls beyond
                its end have none.
            unparsed_calls: passed on to the report.
            decode: turns token ids into text; used for the tokens around a fork.
        """
        tree = TokenTree(calls)
        return cls(
            calls=len(tree.calls),
            sequences=len(tree.leaves),
            duplicates=tree.duplicates,
            abandoned=sum(node.abandoned for node in tree.nodes),
            forks=_forks(tree.calls, reasons, decode),
            trained_tokens=sum(len(node.tokens.generation_token_ids) for node in tree.nodes),
            total_tokens=sum(leaf.tokens.total_tokens for leaf in tree.leaves),
            generated_tokens=sum(len(call.generation_token_ids) for call in tree.calls),
            unparsed_calls=unparsed_calls,
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all rows that carry no loss: prompts, tool outputs, and context trained elsewhere."""
        return self.total_tokens - self.trained_tokens

    @property
    def trained_share(self) -> float:
        """Share of the generated tokens that carry loss, 0 to 1; 1 if nothing was generated."""
        return self.trained_tokens / self.generated_tokens if self.generated_tokens else 1.0

    @property
    def unreported_forks(self) -> int:
        """How many calls left their history without a word from the server."""
        return sum(not fork.reported for fork in self.forks)

    def __str__(self) -> str:
        counts = {
            "duplicates": self.duplicates,
            "abandoned": self.abandoned,
            "forks": len(self.forks),
            "unreported forks": self.unreported_forks,
            "unparsed calls": self.unparsed_calls,
        }
        odd = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        lines = [
            f"calls {self.calls}, sequences {self.sequences}{', ' if odd else ''}{odd}",
            f"tokens {self.total_tokens}: {self.prompt_tokens} prompted, {self.trained_tokens} trained "
            f"({self.trained_share:.1%} of {self.generated_tokens} generated)",
        ]
        return "\n".join([*lines, *(f"  {fork}" for fork in self.forks)])


def _forks(calls: Sequence[CallTokens], reasons: Sequence[str | None], decode: Decode | None) -> list[Fork]:
    trie = PrefixTrie()  # of the calls before the one that is looked at
    ends: dict[int, Place] = {}
    prompts: set[int] = set()
    forks: list[Fork] = []
    for index, call in enumerate(calls):
        ancestor, tail = call.prompt_after(ends)
        start = trie.root if ancestor is None else ends[id(ancestor)]
        place, edge, shared = trie.follow(start, tail)
        at_end = edge is None and not place.below
        again = edge is None and shared == len(tail) and id(place) in prompts
        if not at_end and not again:
            expected = _onwards(place, edge, start.depth + shared)
            reason = reasons[index] if index < len(reasons) else None
            forks.append(_fork(index, call, reason, start.depth + shared, expected, decode))
        prompt = trie.insert(start, tail)
        prompts.add(id(prompt))
        ends[id(call)] = trie.insert(prompt, call.generation_token_ids)
    trie.clear()
    return forks


def _onwards(place: Place, edge: Place | None, position: int) -> list[int]:
    """Return up to `_SHOWN` tokens with which the trie goes on from a position at or below a place."""
    if edge is None:
        return place.next_tokens(_SHOWN)
    start = edge.start + position - place.depth
    tokens = edge.source[start : min(edge.end, start + _SHOWN)]
    return tokens + edge.next_tokens(_SHOWN - len(tokens))


def _fork(
    index: int,
    call: CallTokens,
    reason: str | None,
    position: int,
    expected: list[int],
    decode: Decode | None,
) -> Fork:
    prompt = call.prompt_token_ids
    found = prompt[position : position + _SHOWN]
    return Fork(
        call=index,
        reason=reason or UNREPORTED,
        diverged_at=position,
        shared=prompt[max(0, position - _SHOWN) : position],
        expected=expected,
        found=found,
        expected_text=None if decode is None else decode(expected),
        found_text=None if decode is None else decode(found),
    )
