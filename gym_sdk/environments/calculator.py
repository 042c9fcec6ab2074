"""Exact arithmetic on expressions that a model wrote."""

from __future__ import annotations

import ast
import re
from decimal import Decimal, localcontext
from fractions import Fraction

__all__ = ["CalculationError", "evaluate", "format_number"]

_MAX_LENGTH = 200
_DIGITS = 12
_ALIASES = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-"})
_ALLOWED = re.compile(r"[0-9.+\-*/() \t\r\n]*")
_LEADING_ZEROS = re.compile(r"(?<![0-9.])0+(?=[0-9])")


class CalculationError(ValueError):
    """An expression has no value; the message is for whoever wrote it."""


def evaluate(expression: str) -> Fraction:
    """Evaluate `+ - * /`, brackets and signs over integers and decimals, exactly.

    The multiplication and division signs and U+2212 are accepted too. Nothing else is: names, powers and
    exponents are rejected before Python's parser sees them, and 200 characters bound the work.

    Raises:
        CalculationError: the expression is too long, is not arithmetic, or divides by zero.
    """
    text = expression.translate(_ALIASES).strip()
    if not text:
        raise CalculationError("the expression is empty")
    if len(text) > _MAX_LENGTH:
        raise CalculationError(f"the expression has {len(text)} characters; the limit is {_MAX_LENGTH}")
    allowed = _ALLOWED.match(text)
    if allowed is not None and allowed.end() < len(text):
        raise CalculationError(f"{text[allowed.end()]!r} is not allowed; use digits, + - * / and brackets")
    text = _LEADING_ZEROS.sub("", " ".join(text.split()))
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise CalculationError(f"{expression!r} is not a complete arithmetic expression") from None
    return _value(tree.body, text)


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            # from the text: a float would have lost the exact decimal
            return Fraction(Decimal(ast.get_source_segment(text, node) or "0"))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, text)
        case ast.BinOp(op=ast.Add()):
            return _value(node.left, text) + _value(node.right, text)
        case ast.BinOp(op=ast.Sub()):
            return _value(node.left, text) - _value(node.right, text)
        case ast.BinOp(op=ast.Mult()):
            return _value(node.left, text) * _value(node.right, text)
        case ast.BinOp(op=ast.Div()):
            divisor = _value(node.right, text)
            if not divisor:
                raise CalculationError("division by zero")
            return _value(node.left, text) / divisor
        case ast.Call():
            raise CalculationError("write * between a number and a bracket")
        case _:
            raise CalculationError("only + - * / and brackets are allowed, no ** or //")


def format_number(value: Fraction) -> str:
    """Write a number: integers in full, everything else with up to 12 significant digits, no exponent."""
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext() as context:
        context.prec = _DIGITS
        rounded = Decimal(value.numerator) / Decimal(value.denominator)
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
