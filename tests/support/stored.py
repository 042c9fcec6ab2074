"""Responses to keep, without a policy."""

from __future__ import annotations

from backends.ids import new_id
from backends.server.state import StoredResponse
from gym_sdk.schema import InputText, Message, OutputText, Response
from gym_sdk.tokens import CallTokens, WeightSpan


def asked(text: str, item_id: str | None = None) -> Message:
    return Message(role="user", content=[InputText(text=text)], id=item_id)


def stored(
    text: str,
    *,
    previous: StoredResponse | None = None,
    scope: str = "",
    new_tokens: int = 3,
    shares: bool = True,
    status: str = "completed",
    background: bool = False,
    response_id: str | None = None,
    size: int = 100,
) -> StoredResponse:
    """A response that said a text; its tokens extend those of the previous one, as a policy's do."""
    prompt, own = list(range(new_tokens)), ([7, 8], [-0.5, -0.25], (WeightSpan("0", 0, 2),))
    before = previous.response.tokens if previous is not None else None
    if before is None:
        tokens = CallTokens(prompt, *own)
    elif shares:
        tokens = CallTokens.extending(before, prompt, *own)
    else:
        tokens = CallTokens(before.token_ids + prompt, *own)
    said = Message(id=new_id("msg"), role="assistant", content=[OutputText(text=text)], status="completed")
    response = Response(
        id=response_id or new_id("resp"),
        created_at=1,
        model="policy",
        status=status,
        output=[said] if status == "completed" else [],
        previous_response_id=None if previous is None else previous.id,
        metadata={"text": text},
        store=True,
        background=background,
    )
    if status == "completed":
        response.carrying(tokens, extends=previous.id if previous is not None and shares else None)
    return StoredResponse.of(response, [asked(f"say {text}")], scope=scope, size=size)
