from itertools import islice
from random import Random

from backends.tiny import CALCULATOR_TOOL, TraceMix
from backends.tiny.examples import Example, ExampleEncoder, make_batches
from backends.tiny.questions import chain_sum
from backends.tiny.tokenizer import build_tokenizer
from backends.tiny.traces import TraceKind, generate_traces, make_trace

TOKENIZER = build_tokenizer(2048)
ENCODER = ExampleEncoder(TOKENIZER)


def masked_runs(example: Example) -> list[str]:
    """Decode each run of tokens that carries loss."""
    runs: list[list[int]] = []
    previous = False
    for token_id, masked in zip(example.token_ids, example.loss_mask, strict=True):
        if masked and not previous:
            runs.append([])
        if masked:
            runs[-1].append(token_id)
        previous = masked
    return [TOKENIZER.decode(run) for run in runs]


def test_only_what_the_assistant_generates_carries_loss() -> None:
    question = chain_sum(Random(0))
    example = ENCODER.trace(make_trace(Random(0), TraceKind.GOOD, question))
    call = f'{{"name": "calculator", "arguments": {{"expression": "{question.expression}"}}}}'
    assert masked_runs(example) == [
        f"<tool_call>\n{call}\n</tool_call><|im_end|>",
        f"The answer is {question.answer}.<|im_end|>",
    ]


def test_a_trace_extends_the_prompts_of_a_rollout() -> None:
    for trace in islice(generate_traces(Random(5), TraceMix()), 100):
        example = ENCODER.trace(trace)
        for index, message in enumerate(trace.messages):
            if message["role"] != "assistant":
                continue
            prompt = TOKENIZER.apply_chat_template(
                trace.messages[:index],
                tools=[CALCULATOR_TOOL],
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
        example = ENCODER.trace(make_trace(rng, TraceKind.GOOD, chain_sum(rng)))
        assert example.loss_mask.index(True) <= 42
        assert len(example.token_ids) <= 96


def test_copying() -> None:
    rng = Random(0)
    for _ in range(200):
        example = ENCODER.copying(rng)
        third = len(example.token_ids) // 3
        assert example.token_ids == example.token_ids[:third] * 3
        assert example.loss_mask == [False] * third + [True] * (2 * third)
        assert TOKENIZER.decode(example.token_ids[:third]).endswith("\n")


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
