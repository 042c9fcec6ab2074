"""Time of a weight push into SGLang by each carrier, beside copying the same bytes in memory.

A random model of the tiny policy's architecture is served by SGLang on the CPU, in float32. Each run changes
the trainer's weights and pushes them by every carrier in turn; between two pushes the weights are changed
again, and after each push the log-probs of sampled tokens are compared with a forward pass of the trainer.
Given is the time from `push` to its return: generation stands still for most of it, except for LoRA. SGLang
and the trainer share the machine's cores.

    python benchmarks/weight_sync.py
    python benchmarks/weight_sync.py --megabytes 200 --runs 9 --output weight_sync.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import torch
from _report import Report
from aiohttp.test_utils import TestServer
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from backends.engine import GenerationRequest, SamplingParams
from backends.policy import Policy
from backends.server import make_app
from backends.sglang import CPU_ARGUMENTS, SGLangConfig, SGLangEngine, launch_sglang
from backends.tiny import TinyRecipe, build_tiny_policy
from gym_sdk import GymClient
from gym_sdk.grpo import BroadcastSync, FolderSync, LoRASync, TensorSync, WeightSync
from gym_sdk.grpo.checkpoints.folders import save_model

ROOT = Path(__file__).resolve().parents[1]
PROMPT = list(range(5, 37))
LORA = (
    "--enable-lora",
    "--max-lora-rank",
    "16",
    "--lora-target-modules",
    "all",
    "--lora-backend",
    "torch_native",
)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=150, help="of weights, about")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-sglang" / "bin" / "python")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a folder in memory (tmpfs)")
    parser.add_argument("--output", type=Path, help="write all runs as JSON")
    asyncio.run(measure(parser.parse_args()))


async def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir=options.memory) as memory:
        folder = make_model(Path(disk) / "model", options.megabytes)
        nbytes = (folder / "model.safetensors").stat().st_size
        report = Report(
            "Weight push into SGLang [ms]",
            {"weights_mb": round(nbytes / 1e6, 1), "runs": options.runs, "dtype": "float32", "device": "cpu"},
            packages=("gym-sdk", "torch", "transformers", "peft"),
        )
        farthest: dict[str, float] = {}
        async with sglang(folder, options.python) as (engine, inside):
            await measure_full(
                engine, inside, folder, Path(disk), Path(memory), options.runs, report, farthest
            )
        async with sglang(folder, options.python, *LORA) as (engine, _):
            size = await measure_adapter(engine, folder, Path(memory), options.runs, report, farthest)
    report.show(rows="carrier", columns="figure")
    copy = next(result["median"] for result in report.results if result["carrier"] == "copy in memory")
    print(f"\nadapter: {size / 1e6:.2f} MB on the wire, {100 * size / nbytes:.1f} % of the full weights")
    print("\n| carrier | times the copy in memory | farthest log-prob |\n| --- | --- | --- |")
    for result in report.results:
        name = result["carrier"]
        distance = f"{farthest[name]:.1e}" if name in farthest else "-"
        print(f"| {name} | {result['median'] / copy:.1f} | {distance} |")
    if options.output is not None:
        report.write(options.output)


def make_model(folder: Path, megabytes: int) -> Path:
    """A model of the tiny policy's architecture and tokenizer, with layers until it is large enough."""
    build_tiny_policy(folder, TinyRecipe.untrained())
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size = 768, 2304
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 12, 6, 64
    layer = 4 * (768 * (12 + 6) * 64 * 2 + 3 * 768 * 2304)
    config.num_hidden_layers = max(1, round(megabytes * 1e6 / layer))
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(config), folder)
    return folder


@asynccontextmanager
async def sglang(
    folder: Path, python: Path, *arguments: str
) -> AsyncIterator[tuple[SGLangEngine, SGLangEngine]]:
    """An engine, and one on the same SGLang that sends tensors inside the requests."""
    options = (*CPU_ARGUMENTS, "--max-total-tokens", "8192", "--context-length", "1024", *arguments)
    launched = launch_sglang(folder, python=python, arguments=options)
    async with launched as process, await SGLangEngine.connect(process.url) as engine:
        config = SGLangConfig(shared_memory=None)
        async with await SGLangEngine.connect(process.url, config=config) as inside:
            yield engine, inside


async def measure_full(
    engine: SGLangEngine,
    inside: SGLangEngine,
    folder: Path,
    disk: Path,
    memory: Path,
    runs: int,
    report: Report,
    farthest: dict[str, float],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    policy, policy_inside = (Policy(one, cast(Any, None)) for one in (engine, inside))
    async with AsyncExitStack() as stack:
        clients = []
        for one in (policy, policy_inside):
            server = await stack.enter_async_context(TestServer(make_app(one)))
            clients.append(await stack.enter_async_context(GymClient(str(server.make_url("/v1")))))
        syncs: dict[str, WeightSync] = {
            "folder on disk": FolderSync(policy, disk / "pushed", keep=1),
            "folder in memory": FolderSync(policy, memory / "pushed", keep=1),
            "tensors, shared memory": TensorSync(policy),
            "tensors, inside the requests": TensorSync(policy_inside),
            "tensors over HTTP, shared memory": TensorSync(clients[0]),
            "tensors over HTTP, inside the requests": TensorSync(clients[1]),
            "broadcast (gloo)": await stack.enter_async_context(BroadcastSync(policy)),
        }

        def push(name: str) -> Callable[[str], Awaitable[None]]:
            return lambda version: syncs[name].push(model, version=version)

        times: dict[str, list[float]] = {"copy in memory": [], **{name: [] for name in syncs}}
        for run in range(-1, runs):  # the first one warms up
            took = copy_ms(model)
            if run >= 0:
                times["copy in memory"].append(took)
            for name in syncs:
                change(model)
                took = await timed(push(name), f"{name} {run}")
                one = inside if "inside" in name else engine
                farthest[name] = max(farthest.get(name, 0.0), await distance(one, model))
                if run >= 0:
                    times[name].append(took)
    for name, values in times.items():
        report.add(values, carrier=name, figure="push")


async def measure_adapter(
    engine: SGLangEngine, folder: Path, memory: Path, runs: int, report: Report, farthest: dict[str, float]
) -> int:
    config = LoraConfig(r=16, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    sync = LoRASync(Policy(engine, cast(Any, None)), memory / "adapters", keep=1)
    name, times = "LoRA adapter (rank 16)", []
    for run in range(-1, runs):
        change(model, only="lora_")
        took = await timed(lambda version: sync.push(model, version=version), f"adapter {run}")
        farthest[name] = max(farthest.get(name, 0.0), await distance(engine, model))
        if run >= 0:
            times.append(took)
    report.add(times, carrier=name, figure="push")
    (pushed,) = (memory / "adapters").iterdir()
    json.loads((pushed / "adapter_config.json").read_text())
    return sum(file.stat().st_size for file in pushed.iterdir())


def copy_ms(model: PreTrainedModel) -> float:
    """Copy all weights into memory that is there already."""
    tensors = list(model.parameters())
    target = [torch.zeros_like(tensor) for tensor in tensors]
    started = time.perf_counter()
    with torch.no_grad():
        for new, old in zip(target, tensors, strict=True):
            new.copy_(old)
    return 1000 * (time.perf_counter() - started)


def change(model: Any, only: str = "") -> None:
    """Take a step, so that a push that did not arrive would be seen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name and parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


async def timed(push: Callable[[str], Awaitable[None]], version: str) -> float:
    started = time.perf_counter()
    await push(version.replace(",", "").replace(" ", "-"))
    return 1000 * (time.perf_counter() - started)


async def distance(engine: SGLangEngine, model: Any) -> float:
    """The farthest of the sampled tokens' log-probs from the trainer's own."""
    generation = await engine.generate(
        GenerationRequest(os.urandom(4).hex(), PROMPT, SamplingParams(max_new_tokens=32))
    )
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *generation.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    scores = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(generation.token_ids)[:, None])
    return float((scores[:, 0] - torch.tensor(generation.log_probs)).abs().max())


if __name__ == "__main__":
    main()
