"""The model calls of a rollout as a tree: who extends whom, and what was left behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gym_sdk.tokens.calls import CallTokens
from gym_sdk.tokens.prefixes import Place, PrefixTrie

__all__ = ["CallNode", "TokenTree"]


@dataclass(slots=True)
class CallNode:
    """A model call in a `TokenTree`. Nodes are numbered; numbers and indices start at 0.

    Attributes:
        call: index of the model call that this node stands for.
        tokens: that call's tokens.
        copies: indices of the calls with this prompt and generation, `call` included, in order of arrival.
        parent: number of the node that this one extends; None for a root.
        children: numbers of the nodes that extend this one.
        continued: whether this node's tokens are the start of some other call's prompt.
        abandoned: whether this node was not continued while another node with the same prompt was, or arrived
            later (see `TokenTree`).
    """

    call: int
    tokens: CallTokens
    copies: list[int]
    parent: int | None = None
    children: list[int] = field(default_factory=list)
    continued: bool = False
    abandoned: bool = False


class TokenTree:
    """The model calls of one rollout, ordered by prefix.

    Write a call as `p|g`: prompt p, generation g, tokens pg. A node *extends* the node with the longest
    tokens that are a prefix of its prompt:

        a|b        abc|d      extends a|b
                   abc|e      extends a|b as well: the same prompt again
                   abcdf|g    extends abc|d
        h|i                   extends nothing: a root

    - Each node is one generation, so each sampled token is in exactly one node.
    - Calls with the same prompt and the same generation are one node: an answer that was recorded twice.
      Where their log-probs or weight versions differ, the smaller ones stand (compared as lists).
    - A call without a generated token is no node and nobody's parent.
    - Of nodes with equal tokens, such as `a|bc` and `ab|c`, the one with the shortest prompt is the parent.
    - *Abandoned* is a node that is not continued although another node with the same prompt is: `abc|e`
      above, a request that was sent again. If none of them is continued, the tokens cannot tell which one
      counts, and it is the one that arrived last. A branch that went on for some calls before it was left
      cannot be told from one that was wanted, so its calls are not abandoned.

    Nothing but that last tie depends on the order of the calls. Whether calls are linked
    (`CallTokens.extending`) makes no difference either, except in cost: a linked call costs as much as it has
    new tokens, and one that came whole as much as its prompt.

    Args:
        calls: the model calls of one rollout, in order of arrival.

    Attributes:
        calls: the calls.
        nodes: in order of their first arrival.
        empty: indices of the calls without a generated token.
    """

    def __init__(self, calls: Iterable[CallTokens]) -> None:
        self.calls = list(calls)
        self.nodes: list[CallNode] = []
        self.empty: list[int] = []
        trie = PrefixTrie()
        places = [trie.insert_call(call) for call in self.calls]
        self._make_nodes(places)
        self._link(trie, places)
        self._mark_abandoned(places)
        trie.clear()

    @property
    def roots(self) -> list[CallNode]:
        """The nodes that extend nothing."""
        return [node for node in self.nodes if node.parent is None]

    @property
    def leaves(self) -> list[CallNode]:
        """The nodes that nothing extends: each ends one training row."""
        return [node for node in self.nodes if not node.children]

    @property
    def duplicates(self) -> int:
        """How many calls repeat the prompt and generation of another one."""
        return len(self.calls) - len(self.empty) - len(self.nodes)

    def path(self, node: CallNode) -> list[CallNode]:
        """Return the nodes from a root to this one."""
        line = [node]
        while line[-1].parent is not None:
            line.append(self.nodes[line[-1].parent])
        line.reverse()
        return line

    def __repr__(self) -> str:
        return (
            f"<TokenTree of {len(self.calls)} calls: {len(self.nodes)} nodes, {len(self.roots)} roots, "
            f"{len(self.leaves)} leaves>"
        )

    def _make_nodes(self, places: list[tuple[Place, Place]]) -> None:
        """Make a node of each generation, and note at its end place which nodes end there."""
        numbers: dict[tuple[int, int], int] = {}
        for index, (call, (prompt, end)) in enumerate(zip(self.calls, places, strict=True)):
            if not call.generation_token_ids:
                self.empty.append(index)
                continue
            number = numbers.setdefault((id(prompt), id(end)), len(self.nodes))
            if number == len(self.nodes):
                self.nodes.append(CallNode(index, call, [index]))
                end.calls.append(number)
                continue
            node = self.nodes[number]
            node.copies.append(index)
            if _measured(call) < _measured(node.tokens):
                node.call, node.tokens = index, call

    def _link(self, trie: PrefixTrie, places: list[tuple[Place, Place]]) -> None:
        """Find each node's parent: the closest end of a node at or above the end of its prompt."""
        above: dict[int, int | None] = {}
        for place in trie.walk():
            inherited = None if place.above is None else above[id(place.above)]
            if place.calls:
                inherited = min(place.calls, key=lambda number: self.nodes[number].tokens.prompt_length)
            above[id(place)] = inherited
        for number, node in enumerate(self.nodes):
            node.parent = above[id(places[node.call][0])]
            if node.parent is not None:
                self.nodes[node.parent].children.append(number)
        # a prompt goes on from all nodes that it has passed; marking stops where an earlier one went before
        for prompt, _ in places:
            self._mark_continued(prompt)

    def _mark_continued(self, prompt: Place) -> None:
        place: Place | None = prompt
        while place is not None:
            for number in place.calls:
                if self.nodes[number].continued:
                    return
                self.nodes[number].continued = True
            place = place.above

    def _mark_abandoned(self, places: list[tuple[Place, Place]]) -> None:
        alike: dict[int, list[CallNode]] = {}
        for node in self.nodes:
            alike.setdefault(id(places[node.call][0]), []).append(node)
        for nodes in alike.values():
            kept = [node for node in nodes if node.continued]
            if not kept:
                kept = [max(nodes, key=lambda node: node.copies[-1])]
            for node in nodes:
                node.abandoned = all(node is not other for other in kept)


def _measured(call: CallTokens) -> tuple[object, ...]:
    spans = [(span.start, span.end, span.version) for span in call.weight_versions]
    return call.generation_log_probs, spans
