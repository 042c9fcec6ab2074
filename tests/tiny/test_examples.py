from itertools import islice
from random import Random

import pytest

from backends.tiny import RECIPES
from backends.tiny.examples import Example, ExampleEncoder, make_batches
from backends.tiny.families.arithmetic import ArithmeticTrace, arithmetic_trace
from backends.tiny.families.calculator import CALCULATOR_TOOL
from backends.tiny.families.lockers import LockersTrace, lockers_trace
from backends.tiny.families.questions import chain_sum
from backends.tiny.tokenizer import build_tokenizer

TOKENIZERS = {name: build_tokenizer(2048, recipe.mix.vocabulary) for name, recipe in RECIPES.items()}
TOKENIZER = TOKENIZERS["arithmetic"]
ENCODER = ExampleEncoder(TOKENIZER, CALCULATOR_TOOL)


def masked_runs(example: Example, family: str = "arithmetic") -> list[str]:
    """Decode each run of tokens that carries loss."""
    runs: list[list[int]] = []
    previous = False
    for token_id, masked in zip(example.token_ids, example.loss_mask, strict=True):
        if masked and not previous:
            runs.append([])
        if masked:
            runs[-1].append(token_id)
        previous = masked
    return [TOKENIZERS[family].decode(run) for run in runs]


def test_only_what_the_assistant_generates_carries_loss() -> None:
    question = chain_sum(Random(0))
    example = ENCODER.trace(arithmetic_trace(Random(0), ArithmeticTrace.GOOD, question))
    call = f'{{"name": "calculator", "arguments": {{"expression": "{question.expression}"}}}}'
    assert masked_runs(example) == [
        f"<tool_call>\n{call}\n</tool_call><|im_end|>",
        f"The answer is {question.answer}.<|im_end|>",
    ]


def test_each_turn_of_the_assistant_carries_loss() -> None:
    encoder = ExampleEncoder(TOKENIZERS["lockers"], RECIPES["lockers"].mix.tool)
    example = encoder.trace(lockers_trace(LockersTrace.FOLLOW, [("q", "4"), ("b", "7")]))
    assert masked_runs(example, "lockers") == [
        '<tool_call>\n{"name": "open", "arguments": {"locker": "q"}}\n</tool_call><|im_end|>',
        '<tool_call>\n{"name": "open", "arguments": {"locker": "b"}}\n</tool_call><|im_end|>',
        "The code is 47.<|im_end|>",
    ]


@pytest.mark.parametrize("family", list(RECIPES))
def test_a_trace_extends_the_prompts_of_a_rollout(family: str) -> None:
    mix, tokenizer = RECIPES[family].mix, TOKENIZERS[family]
    encoder = ExampleEncoder(tokenizer, mix.tool)
    for messages in islice(mix.traces(Random(5)), 60):
        example = encoder.trace(messages)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(
                messages[:index],
                tools=[mix.tool] if mix.tool else None,
                add_generation_prompt=True,
                return_dict=False,
            )
            assert example.token_ids[: len(prompt)] == prompt
            assert not example.loss_mask[len(prompt) - 1]
            assert example.loss_mask[len(prompt)]


def test_traces_are_short() -> None:
    """The sizes that make learning on two cores possible."""
    rng = Random(0)
    for _ in range(200):
        example = ENCODER.trace(arithmetic_trace(rng, ArithmeticTrace.GOOD, chain_sum(rng)))
        assert example.loss_mask.index(True) <= 42
        assert len(example.token_ids) <= 96


def test_the_first_line_of_a_drill_is_given() -> None:
    example = ENCODER.drill(["1 + 2", "1 + 2", "-3"])
    assert TOKENIZER.decode(example.token_ids) == "1 + 2\n1 + 2\n-3\n"
    assert masked_runs(example) == ["1 + 2\n-3\n"]


def test_batches_hold_every_row_once_and_padding_carries_no_loss() -> None:
    rows = [Example([index + 1] * (index % 7 + 1), [True] * (index % 7 + 1)) for index in range(20 * 3)]
    supply = iter(rows)
    batches = list(make_batches(Random(0), lambda: next(supply), 3, 20, pad_token_id=0))
    assert len(batches) == 20
    seen = []
    for batch in batches:
        assert batch.token_ids.shape == batch.loss_mask.shape
        assert bool((batch.loss_mask == (batch.token_ids != 0)).all())
        seen += [int(row[0]) for row in batch.token_ids]
    assert sorted(seen) == [row.token_ids[0] for row in rows]
