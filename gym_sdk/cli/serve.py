"""`gym-sdk serve`: a model behind an OpenAI-compatible server that returns token ids."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_sdk.cli._extras import needs_extra
from gym_sdk.cli._operation import add_operation_arguments, operation_config
from gym_sdk.cli._quiet import quiet_transformers

if TYPE_CHECKING:
    from backends.sglang import SGLangOptions

__all__ = ["add_backend_arguments", "add_parser", "add_rendering_arguments", "rendering_options"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve", help="serve a model over HTTP", description=__doc__
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, or a name on the Hugging Face hub")
    add_backend_arguments(parser)
    parser.add_argument(
        "--sglang-url",
        nargs="+",
        default=[],
        metavar="URL",
        help="SGLangs that run already, e.g. http://127.0.0.1:30000, or an sglang-router that lists them",
    )
    parser.add_argument(
        "--sglang-args", default="", metavar="ARGS", help="further arguments of sglang.launch_server, quoted"
    )
    parser.add_argument("--sglang-log", type=Path, help="file for SGLang's output")
    parser.add_argument("--sglang-api-key", help="its --admin-api-key or --api-key")
    parser.add_argument(
        "--sglang-restarts",
        type=int,
        default=3,
        help="how often in a row to start SGLang again when it ends by itself",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", default="policy", help="the model's name on the wire")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; a GPU if there is one, by default")
    parser.add_argument("--dtype", help="float32, bfloat16, float16")
    parser.add_argument("--context-length", type=int, help="most tokens of prompt and generation")
    parser.add_argument("--threads", type=int, help="CPU threads for the model")
    add_rendering_arguments(parser)
    parser.add_argument(
        "--token-form",
        default="item",
        choices=["item", "response", "compact"],
        help="where responses carry their tokens, unless a request chooses by its Gym-Token-Form header",
    )
    parser.add_argument(
        "--strict-tools",
        action="store_true",
        help="hold calls to the schemas of tools that are `strict`; by default the policy may call wrongly",
    )
    parser.add_argument(
        "--state-file", type=Path, help="SQLite file that keeps responses over restarts; memory by default"
    )
    add_operation_arguments(parser)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alive-fd", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides which engine generates."""
    parser.add_argument("--backend", default="transformers", choices=["transformers", "sglang"])
    parser.add_argument(
        "--sglang-python",
        metavar="PYTHON",
        help="interpreter of an environment with SGLang, to launch one; by default the one that the "
        "environment variable GYM_SDK_SGLANG_PYTHON names, else this one",
    )


def _sglang_options(arguments: argparse.Namespace) -> SGLangOptions:
    from backends.sglang import SGLangOptions

    return SGLangOptions(
        urls=tuple(arguments.sglang_url),
        api_key=arguments.sglang_api_key,
        restarts=arguments.sglang_restarts,
        python=arguments.sglang_python,
        arguments=tuple(shlex.split(arguments.sglang_args)),
        log=arguments.sglang_log,
    )


def add_rendering_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides how conversations become tokens and generations items."""
    parser.add_argument(
        "--renderer", default="auto", help="auto, template, or a family's name of the package renderers"
    )
    parser.add_argument(
        "--parser",
        help="how generations are read, by default found out from the template; with the backend sglang also "
        "sglang:TOOL, sglang:TOOL+REASONING or sglang:+REASONING, SGLang's own parsers",
    )
    parser.add_argument(
        "--thinking",
        default="keep",
        choices=["keep", "template"],
        help="keep the thinking of earlier turns, or fork where the chat template drops it",
    )
    parser.add_argument(
        "--template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help="settings of the chat template, e.g. '{\"enable_thinking\": false}'",
    )


def rendering_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the same as fields of `RenderingConfig`."""
    return {
        "renderer": arguments.renderer,
        "parser": arguments.parser,
        "thinking": arguments.thinking,
        "template_kwargs": arguments.template_kwargs,
    }


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    with needs_extra("local"):
        from backends.loading import PolicyConfig
        from backends.renderers import RenderingConfig
        from backends.server import ServerConfig, serve
        from backends.server.operation import log_formatter

        quiet_transformers()

    for handler in logging.getLogger().handlers:
        handler.setFormatter(log_formatter(arguments.log_format))
    model = PolicyConfig(
        model=arguments.model,
        backend=arguments.backend,
        name=arguments.name,
        device=arguments.device,
        dtype=arguments.dtype,
        context_length=arguments.context_length,
        threads=arguments.threads,
        rendering=RenderingConfig(**rendering_options(arguments)),
        sglang=_sglang_options(arguments),
        strict_tools=arguments.strict_tools,
    )
    server = ServerConfig(
        host=arguments.host,
        port=arguments.port,
        token_form=arguments.token_form,
        drain_s=arguments.drain_s,
        state_file=arguments.state_file,
        operation=operation_config(arguments),
        allow_unauthenticated=arguments.allow_unauthenticated,
        ready_fd=arguments.ready_fd,
        alive_fd=arguments.alive_fd,
    )
    asyncio.run(serve(model, server))
    return 0
