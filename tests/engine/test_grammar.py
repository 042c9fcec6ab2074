"""A request with a grammar spells it to the end, and is told the log-probs of the policy without it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import pytest_asyncio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from backends.engine import FinishReason, Generation, GenerationRequest, SamplingParams, TensorWeights
from backends.transformers import EngineConfig, TransformersEngine
from gym_sdk.errors import ConfigurationError, PolicyError

END = 2
STOPS = frozenset({END})
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def spelled(schema: object) -> str:
    """The grammar of a schema's instances, without the white space in which an untrained model gets lost."""
    tight = {**schema, "x-guidance": {"whitespace_flexible": False}} if isinstance(schema, dict) else schema
    return f"start: %json {json.dumps(tight)} <[{END}]>"


@pytest.fixture(scope="module")
def tokenizer(untrained_policy: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(untrained_policy))


@pytest.fixture(scope="module")
def model(untrained_policy: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(untrained_policy)).eval()


@pytest_asyncio.fixture
async def engine(untrained_policy: Path) -> AsyncIterator[TransformersEngine]:
    async with TransformersEngine.from_folder(untrained_policy, device="cpu") as engine:
        yield engine


Make = Callable[..., GenerationRequest]


@pytest.fixture
def ask(make_request: Callable[..., GenerationRequest]) -> Make:
    def make(grammar: str | None, new: int | None = 200, prompt: object = (5, 17, 42), **sampling: object):
        return make_request(prompt, new, grammar=grammar, stop_token_ids=STOPS, **sampling)

    return make


def text_of(tokenizer: PreTrainedTokenizerFast, generation: Generation) -> str:
    assert generation.finish_reason is FinishReason.STOP
    assert generation.token_ids[-1] == END
    return tokenizer.decode(generation.token_ids[:-1])


@pytest.mark.asyncio
async def test_what_is_generated_is_of_the_schema(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerFast, ask: Make
) -> None:
    requests = [
        ask(spelled(PERSON), temperature=temperature, seed=seed)
        for temperature in (0.0, 0.6, 1.0, 3.0)
        for seed in range(8)
    ]
    generations = await asyncio.gather(*map(engine.generate, requests))
    texts = [text_of(tokenizer, generation) for generation in generations]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts[:8])) == 1  # greedy
    assert len(set(texts[8:])) > 12


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 3, "top_p": 0.8},
    ],
)
async def test_log_probs_are_those_without_the_grammar(
    engine: TransformersEngine,
    model: PreTrainedModel,
    ask: Make,
    worst_difference: Callable[..., float],
    sampling: dict[str, float],
) -> None:
    request = ask(spelled(PERSON), **sampling, seed=3)
    generation = await engine.generate(request)
    temperature = sampling["temperature"] or 1.0
    assert worst_difference(model, request.prompt_token_ids, generation, temperature) <= 1e-4
    # all that was left is far from all that was likely
    assert sum(generation.log_probs) < -len(generation.log_probs)


@pytest.mark.asyncio
async def test_truncation_and_greedy_choose_among_what_is_allowed(
    engine: TransformersEngine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ask: Make
) -> None:
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    grammar = f"start: /[0-9]/ <[{END}]>"
    with torch.no_grad():
        scores = model(torch.tensor([[5, 17, 42]])).logits[0, -1][digits]
    likeliest = [digits[place] for place in scores.argsort(descending=True).tolist()]
    greedy = [{"temperature": 0.0}, {"temperature": 1e-30}, {"temperature": 1.0, "top_k": 1}]
    for sampling in greedy:
        generation = await engine.generate(ask(grammar, **sampling))
        assert generation.token_ids == [likeliest[0], END]
    few = await asyncio.gather(*(engine.generate(ask(grammar, top_k=3, seed=seed)) for seed in range(64)))
    assert {generation.token_ids[0] for generation in few} == set(likeliest[:3])


@pytest.mark.asyncio
async def test_special_tokens_are_written_by_id_and_never_meant_by_text(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerFast, ask: Make
) -> None:
    call, closing = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
    generation = await engine.generate(ask(f'start: <[{call}]> "yes" <[{closing}]> <[{END}]>'))
    assert generation.token_ids[0] == call
    assert generation.token_ids[-2] == closing
    assert tokenizer.decode(generation.token_ids[1:-2]) == "yes"
    for name in ("<|im_end|>", "<tool_call>"):
        for grammar in (f'start: "{name}" <[{END}]>', f'start: %json {{"const": "{name}"}} <[{END}]>'):
            generation = await engine.generate(ask(grammar))
            assert text_of(tokenizer, generation).strip('"') == name
            assert not {END, call} & set(generation.token_ids[:-1])


@pytest.mark.asyncio
async def test_requests_with_and_without_grammars_do_not_disturb_each_other(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerFast, ask: Make
) -> None:
    plain = [ask(None, 40, seed=seed, temperature=1.5) for seed in range(24)]
    alone = [await engine.generate(request) for request in plain]
    bound = [ask(spelled(PERSON if seed % 2 else {"type": "integer"}), seed=seed) for seed in range(24)]
    first = [await engine.generate(request) for request in bound]
    mixed = [request for pair in zip(plain, bound, strict=True) for request in pair]
    together = await asyncio.gather(*map(engine.generate, mixed))
    assert [generation.token_ids for generation in together[::2]] == [one.token_ids for one in alone]
    assert [generation.token_ids for generation in together[1::2]] == [one.token_ids for one in first]


@pytest.mark.asyncio
async def test_a_stream_says_what_a_generation_says(engine: TransformersEngine, ask: Make) -> None:
    whole = await engine.generate(ask(spelled(PERSON), seed=1))
    chunks = [chunk async for chunk in engine.stream(ask(spelled(PERSON), seed=1))]
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert chunks[-1].finish_reason is FinishReason.STOP


@pytest.mark.asyncio
async def test_the_limit_cuts_it(engine: TransformersEngine, ask: Make) -> None:
    whole = await engine.generate(ask(spelled(PERSON), seed=1))
    cut = await engine.generate(ask(spelled(PERSON), 5, seed=1))
    assert cut.finish_reason is FinishReason.LENGTH
    assert cut.token_ids == whole.token_ids[:5]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("start: nothing", "unknown name"),
        ('start: "a', ""),
        (f'start: %json {{"type": "objekt"}} <[{END}]>', "Invalid type"),
        ("start: <[99999]>", "too large"),
    ],
)
async def test_an_invalid_grammar_is_refused_before_it_runs(
    engine: TransformersEngine, ask: Make, grammar: str, why: str
) -> None:
    for _ in range(2):
        results = await asyncio.gather(
            *(engine.generate(ask(grammar)) for _ in range(4)), return_exceptions=True
        )
        for error in results:
            assert isinstance(error, PolicyError)
            assert (error.code, error.param, error.status) == ("invalid_value", "grammar", 400)
            assert "invalid" in str(error)
            assert why in str(error)
    assert engine.info.running == engine.info.waiting == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("grammar", "count", "why"),
    [
        ('start: "yes"', 1, "no stop token"),
        (f"start: /a/ NONE <[{END}]>\nNONE: /b/ & /c/", 1, "matcher failed"),
    ],
)
async def test_a_dead_end_ends_that_request_alone(
    engine: TransformersEngine, ask: Make, grammar: str, count: int, why: str
) -> None:
    dead = [engine.generate(ask(grammar)) for _ in range(3)]
    living = [engine.generate(ask(spelled(PERSON), seed=seed)) for seed in range(3)]
    plain = [engine.generate(ask(None, 30)) for _ in range(3)]
    results = await asyncio.gather(*dead, *living, *plain, return_exceptions=True)
    for error in results[:3]:
        assert isinstance(error, PolicyError)
        assert f"after {count} of" in str(error)
        assert why in str(error)
        assert len(str(error)) < 500
    assert all(isinstance(result, Generation) for result in results[3:])
    assert engine.info.running == 0


@pytest.mark.asyncio
async def test_a_model_may_know_more_tokens_than_its_tokenizer(
    untrained_policy: Path,
    tokenizer: PreTrainedTokenizerFast,
    make_model: Callable[..., PreTrainedModel],
    ask: Make,
) -> None:
    padded = make_model("llama", vocab_size=len(tokenizer) + 37)
    async with TransformersEngine(padded, tokenizer=tokenizer) as engine:
        requests = [ask(spelled(PERSON), seed=seed) for seed in range(8)]
        for generation in await asyncio.gather(*map(engine.generate, requests)):
            jsonschema.validate(json.loads(text_of(tokenizer, generation)), PERSON)
        # what ends a grammar inside the engine is no token that the model may sample
        for unknown in range(len(tokenizer), len(tokenizer) + 2):
            generation = await engine.generate(ask(f"start: <[{unknown + 1}]> <[{END}]>", 1))
            assert generation.token_ids == [unknown + 1]
        with pytest.raises(PolicyError, match="allows no token after 1"):
            await engine.generate(ask('start: "yes"'))


@pytest.mark.asyncio
async def test_an_engine_without_a_tokenizer_refuses_grammars(
    model: PreTrainedModel, ask: Make, tmp_path: Path
) -> None:
    for tokenizer in (None, tmp_path):
        async with TransformersEngine(model, tokenizer=tokenizer) as engine:
            with pytest.raises(PolicyError, match="tokenizer") as caught:
                await engine.generate(ask('start: "yes"'))
            assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "grammar")
            assert (await engine.generate(ask(None, 3))).token_ids


@pytest.mark.parametrize("changes", [{"grammar": " "}, {"stop_token_ids": frozenset()}])
def test_a_grammar_without_text_or_stop_tokens_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="grammar"):
        SamplingParams(**{"grammar": "start: <[2]>", "stop_token_ids": STOPS} | changes)


@pytest.mark.asyncio
async def test_more_grammars_than_are_kept(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerFast, ask: Make
) -> None:
    words = [f"{'xyz'[number % 3]}{number}" for number in range(150)]
    requests = [ask(f'start: "{word}" <[{END}]>') for word in (*words, *words)]
    generations = await asyncio.gather(*map(engine.generate, requests))
    assert [text_of(tokenizer, generation) for generation in generations] == [*words, *words]


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["retract", "in_place", "update"])
async def test_a_grammar_outlives_pauses_and_updates(
    engine: TransformersEngine,
    tokenizer: PreTrainedTokenizerFast,
    ask: Make,
    in_progress: Callable[..., object],
    slow: Callable[[TransformersEngine], None],
    what: str,
) -> None:
    requests = [ask(spelled(PERSON), seed=seed) for seed in range(6)]
    undisturbed = [await engine.generate(request) for request in requests]
    slow(engine)
    running = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    await in_progress(engine, 6, 4)
    if what == "update":
        new = {name: value * 0.5 for name, value in engine.model.state_dict().items()}
        await engine.update_weights(TensorWeights(new), version="1")
    else:
        await engine.pause(what)
        await engine.continue_generation()
    generations = await asyncio.gather(*running)
    for generation in generations:
        jsonschema.validate(json.loads(text_of(tokenizer, generation)), PERSON)
    if what == "update":
        assert {span.version for one in generations for span in one.weight_versions} == {"0", "1"}
    else:
        assert [one.token_ids for one in generations] == [one.token_ids for one in undisturbed]


@pytest.mark.asyncio
async def test_an_abort_keeps_what_was_spelled(
    engine: TransformersEngine,
    ask: Make,
    in_progress: Callable[..., object],
    slow: Callable[[TransformersEngine], None],
) -> None:
    slow(engine)
    whole = await engine.generate(ask(spelled(PERSON), seed=1))
    running = asyncio.ensure_future(engine.generate(ask(spelled(PERSON), seed=1)))
    await in_progress(engine, 1, 3)
    await engine.abort()
    aborted = await running
    assert aborted.finish_reason is FinishReason.ABORT
    assert aborted.token_ids == whole.token_ids[: len(aborted.token_ids)]


@pytest.mark.asyncio
async def test_requests_that_give_their_slot_back_go_on_where_they_were(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ask: Make
) -> None:
    config = EngineConfig(context_length=256, max_cache_tokens=512)
    async with TransformersEngine(model, config=config, tokenizer=tokenizer) as engine:
        requests = [ask(spelled(PERSON), seed=seed) for seed in range(12)]
        for generation in await asyncio.gather(*map(engine.generate, requests)):
            jsonschema.validate(json.loads(text_of(tokenizer, generation)), PERSON)


NAMES = st.text("abcxyz_", min_size=1, max_size=6)
EXACT = st.integers(-(2**53), 2**53)
"""llguidance reads the numbers of a schema as floats: 9007199254740993 would be spelled ...992."""
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-99, 99),
        st.integers(0, 999),
    ),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 8)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(NAMES, EXACT, st.none()), min_size=1, max_size=4),
    ),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            },
            st.dictionaries(NAMES, inner, max_size=3),
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=20, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_any_small_schema_is_kept(
    schema: dict[str, object], seed: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    async def generations() -> list[Generation]:
        params = SamplingParams(
            max_new_tokens=200, temperature=1.5, seed=seed, stop_token_ids=STOPS, grammar=spelled(schema)
        )
        async with TransformersEngine(model, tokenizer=tokenizer) as engine:
            requests = [GenerationRequest(str(number), [7 + number], params) for number in range(3)]
            return await asyncio.gather(*map(engine.generate, requests))

    for generation in asyncio.run(generations()):
        if generation.finish_reason is not FinishReason.LENGTH:
            jsonschema.validate(json.loads(text_of(tokenizer, generation)), schema)
