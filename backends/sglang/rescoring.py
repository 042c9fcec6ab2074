"""A generation that a grammar constrained: that it was, and the log-probs that the policy itself has.

SGLang masks the logits before it scores what it samples. So the tokens go there once more, as a prompt: what
it says about a prompt's tokens knows of no mask. The last token is left out of that prompt and asked about by
its id, as what might be sampled next: a prompt that fills the context would have no room for the token that
SGLang samples in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llguidance import LLMatcher

from backends.engine import FinishReason, TopLogProbs
from backends.sglang.answer import Answer, likeliest
from backends.sglang.client import SGLangClient
from backends.sglang.flight import Flight
from gym_sdk.errors import PolicyError, TokenContractError, TransportError

__all__ = ["check_spelled", "rescore"]


def check_spelled(flight: Flight, matcher: LLMatcher) -> None:
    """See that a finished generation is what its grammar spells, or the beginning of it.

    Where SGLang's matcher fails, at a dead end or because a grammar is too complex, it says nothing and lets
    the model's own stop token come next.

    Args:
        flight: the generation.
        matcher: at the beginning of the grammar.

    Raises:
        PolicyError: it is not.
    """
    count = len(flight.token_ids)
    spelled = matcher.try_consume_tokens(flight.token_ids)
    if spelled < count and flight.finish_reason is not FinishReason.ABORT:
        raise PolicyError(
            f"the grammar allows no token after {spelled} of the generation: SGLang's matcher failed there",
            code="invalid_value",
            param="grammar",
        )


async def rescore(
    client: SGLangClient, flight: Flight, read: Callable[[Flight, Mapping[str, Any]], Answer]
) -> None:
    """Give a finished generation the log-probs that the policy has without the request's grammar.

    One that was aborted, or is aborted meanwhile, loses its tokens, since they have no log-probs.

    Args:
        client: the way to SGLang.
        flight: the generation.
        read: reads and checks an answer of SGLang.

    Raises:
        TransportError: the weights were replaced in between, so that no single policy can score it; or SGLang
            is gone. The request may be sent again.
        TokenContractError: SGLang scored other tokens.
    """
    aborted = flight.finish_reason is FinishReason.ABORT
    body = None if aborted else await flight.wait(_asked(client, flight))
    answer = None if body is None else read(flight, body)
    if body is None or answer is None or answer.finish_reason is FinishReason.ABORT:
        flight.abort_unscored()
        return
    versions = {span.version for span in (*flight.spans, *(answer.spans or ()))}
    if len(versions) > 1:
        raise TransportError(
            "the weights were replaced while a generation with a grammar was under way, so that no single "
            f"policy can score it ({', '.join(sorted(versions))})",
            retryable=True,
        )
    flight.rescored(*_scores(body, flight))


async def _asked(client: SGLangClient, flight: Flight) -> dict[str, Any]:
    flight.begin_round()
    with flight.settling():
        body = await client.post("/generate", _body(flight), within_s=client.config.generate_s)
    flight.settled = True
    return body


def _body(flight: Flight) -> dict[str, Any]:
    return {
        "rid": flight.rid,
        "input_ids": flight.prompt + flight.token_ids[:-1],
        "return_logprob": True,
        # the first that is scored is the one after this
        "logprob_start_len": len(flight.prompt) - 1,
        "token_ids_logprob": flight.token_ids[-1:],
        "top_logprobs_num": flight.request.sampling.top_log_probs,
        "stream": False,
        **({"lora_path": flight.adapter.name} if flight.adapter is not None else {}),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
    }


def _scores(body: Mapping[str, Any], flight: Flight) -> tuple[list[float], TopLogProbs | None]:
    try:
        meta = body["meta_info"]
        entries = [*meta["input_token_logprobs"][1:], meta["output_token_ids_logprobs"][0][0]]
        scored = [entry[1] for entry in entries]
        log_probs = [float(entry[0]) for entry in entries]
        top = None
        if flight.top_log_probs is not None:
            top = likeliest([*meta["input_top_logprobs"][1:], meta["output_top_logprobs"][0]])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TokenContractError(
            f"SGLang reports no log-probs of its tokens ({type(error).__name__}: {error}): {str(body)[:300]}"
        ) from error
    if scored != flight.token_ids or (top is not None and len(top) != len(scored)):
        raise TokenContractError("SGLang was asked to score a generation, and scored other tokens")
    return log_probs, top
