"""Generations read by SGLang's own parsers."""
