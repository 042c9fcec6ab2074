"""Several SGLangs as one engine."""
