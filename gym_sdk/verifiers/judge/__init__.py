"""A language model as verifier, through any OpenAI-compatible endpoint."""

from gym_sdk.verifiers.judge.judge import Judge, JudgeOptions
from gym_sdk.verifiers.judge.prompts import Prompt, Rubric, quote
from gym_sdk.verifiers.judge.reading import AnswerFormat, choice, json_field, score
from gym_sdk.verifiers.judge.wire import JudgeUsage

__all__ = [
    "AnswerFormat",
    "Judge",
    "JudgeOptions",
    "JudgeUsage",
    "Prompt",
    "Rubric",
    "choice",
    "json_field",
    "quote",
    "score",
]
