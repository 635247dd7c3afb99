"""One command, one table: ``python -m benchmarks.run --device auto``.

A train step of a six-layer Llama with LoRA on all linears, against HF PEFT (eager and compiled) and
against the frozen base alone; the time to the first step; what binding costs; what a mark costs.
Variants are interleaved and medians compared, in one process; nothing is timed whose gradients were
not compared with PEFT's first. Results go to ``benchmarks/results/<device>/``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend

RESULTS = Path(__file__).parent / "results"
RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEC: dict[str, Any] = {
    "rules": [{"method": "lora", "name": [f"*.{t}" for t in TARGETS], "rank": RANK}]
}
Step = Callable[[], Tensor]


def llama(dtype: torch.dtype, device: str, layers: int = 6) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=12, use_cache=False,
        max_position_embeddings=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(device, dtype)


def stepper(model: nn.Module, ids: Tensor) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def variant(name: str, base: nn.Module) -> tuple[nn.Module, bool]:
    """A model to compare, and whether ``torch.compile`` is still to be called on it."""
    model = copy.deepcopy(base)
    if name == "peftfx":
        return peftfx.adapt(model, SPEC), False
    if name == "frozen-only":
        for key, p in model.named_parameters():
            p.requires_grad_(key == "model.layers.0.input_layernorm.weight")
        return model, True
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS)
    return peft.get_peft_model(model, config), name == "peft + compile"


VARIANTS = ("peft", "peft + compile", "peftfx", "frozen-only")


def variants(base: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    return {name: variant(name, base) for name in VARIANTS}


def first_step(name: str, dtype: torch.dtype, device: str) -> float:
    """Seconds of a variant's first step in this process."""
    model, compiles = variant(name, llama(dtype, device))
    step = stepper(torch.compile(model) if compiles else model, batch(device))
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def first_steps(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The same in a process and with a compiler's cache of its own for each variant."""
    found = {}
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            short = str(dtype).removeprefix("torch.")
            command = [sys.executable, "-m", "benchmarks.run", "--device", device,
                       "--first", name, "--dtype", short]  # fmt: skip
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            found[name] = float(done.stdout.split()[-1])
    return found


def batch(device: str) -> Tensor:
    return torch.randint(0, 2048, (4, 128), device=device)


def same_start(models: dict[str, tuple[nn.Module, bool]]) -> None:
    """Gives PEFT's models the tensors of ours."""
    tensors = factors("peftfx", models["peftfx"][0])
    with torch.no_grad():
        for p in tensors.values():
            if p.abs().max() == 0:
                p.normal_(std=0.02)
        for name in ("peft", "peft + compile"):
            for key, p in factors(name, models[name][0]).items():
                p.copy_(tensors[key])


def factors(name: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained tensors of a variant by ``<module>A`` and ``<module>B``."""
    if name == "peftfx":
        return {
            n.partition(":")[0].removesuffix(".weight") + n.rpartition(".")[2]: p
            for n, p in peftfx.named_parameters(model)
        }
    found = {}
    for key, p in model.named_parameters():
        path, lora, rest = key.removeprefix("base_model.model.").partition(".lora_")
        if lora:
            found[path + rest[0]] = p
    return found


def gate(models: dict[str, tuple[nn.Module, bool]], ids: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of a gradient from PEFT's, over PEFT's largest; raises if too large."""
    grads = []
    for name in ("peft", "peftfx"):
        model = models[name][0]
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad.float() for n, p in factors(name, model).items()})
        model.zero_grad(set_to_none=True)
    theirs, ours = grads
    if theirs.keys() != ours.keys():
        raise SystemExit(f"other tensors train than PEFT's: {theirs.keys() ^ ours.keys()}")
    largest = max(g.abs().max() for g in theirs.values())
    worst = float(max((ours[n] - g).abs().max() for n, g in theirs.items()) / largest)
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    if not worst <= bound:
        raise SystemExit(f"gradients differ from PEFT's by {worst:.2g}: nothing is timed")
    return worst


def train_steps(dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    base = llama(dtype, device)
    ids = batch(device)
    models = variants(base)
    same_start(models)
    torch._dynamo.reset()
    steps: dict[str, Step] = {}
    for name, (model, compiles) in models.items():
        steps[name] = stepper(torch.compile(model) if compiles else model, ids)
        steps[name]()
    difference = gate_on_copies(base, ids, dtype)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {n: round(1e3 * m, 2) for n, m in median.items()},
        "over_frozen_only": {n: round(m / median["frozen-only"], 3) for n, m in median.items()},
        "peft_over_ours": round(median["peft"] / median["peftfx"], 3),
        "peft_compiled_over_ours": round(median["peft + compile"] / median["peftfx"], 3),
        "first_step_seconds": {n: round(t, 2) for n, t in first_steps(dtype, device).items()},
        "gradient_difference": difference,
    }


def gate_on_copies(base: nn.Module, ids: Tensor, dtype: torch.dtype) -> float:
    models = variants(base)
    same_start(models)
    return gate(models, ids, dtype)


def binding(count: int = 1000) -> float:
    """Seconds to bind *count* linears by name, without a trace."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
    backend = Backend({"rules": [{"method": "lora", "name": "*", "rank": 2}]}, "eager")
    start = time.perf_counter()
    backend.bind(model)
    return time.perf_counter() - start


def mark_cost(sites: int = 200, rounds: int = 300) -> tuple[float, float]:
    """Microseconds of a compiled call for each linear, and what a mark adds, guards included."""
    x = torch.randn(1, 8)

    def medians(adapts: bool) -> float:
        torch._dynamo.reset()
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(sites))).requires_grad_(False)

        def nothing(gm: Any, inputs: Any) -> Any:
            return lambda *args: (x,)  # the graph is not run: what is left is the call itself

        if adapts:
            spec = {"rules": [{"method": "lora", "name": "*", "rank": 2}]}
            backend: Any = Backend(spec, nothing)
            backend.bind(model, (x,))
        else:
            backend = nothing
        compiled = torch.compile(model, backend=backend)
        compiled(x)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            compiled(x)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    plain = medians(False)
    return 1e6 * plain / sites, 1e6 * (medians(True) - plain) / sites


def processor() -> str:
    """The CPU's name, and the extension that its 16-bit products are made with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    wide = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{facts.get('model name', platform.machine())} {wide}".strip()


def describe(device: str) -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name, "threads": str(torch.get_num_threads()), "commit": commit,
        "torch": torch.__version__, "peft": peft.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--first", choices=VARIANTS, help="time one variant's first step")
    parser.add_argument("--dtype", default="float32", help="for --first")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.first:
        print(first_step(arguments.first, getattr(torch, arguments.dtype), device))
        return
    result: dict[str, Any] = describe(device)
    result["bind_1000_linears_seconds"] = round(binding(), 3)
    plain, mark = mark_cost()
    result["linear_microseconds"], result["mark_microseconds"] = round(plain, 2), round(mark, 2)
    result["shape"] = "Llama, 6 layers, hidden 768, 4×128 tokens, rank 16 on all linears"
    result["train_step"] = [
        train_steps(dtype, device, arguments.rounds) for dtype in (torch.float32, torch.bfloat16)
    ]
    directory = RESULTS / device
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train_step.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    lines = [
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}, "
        f"peft {result['peft']}, commit {result['commit']}. {result['shape']}.",
        "",
        "| dtype | variant | step, ms | / frozen-only | first step, s | / frozen-only |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["train_step"]:
        first = row["first_step_seconds"]
        for name, value in row["milliseconds"].items():
            lines.append(
                f"| {row['dtype']} | {name} | {value} | {row['over_frozen_only'][name]} "
                f"| {first[name]} | {first[name] / first['frozen-only']:.2f} |"
            )
    lines += [
        "",
        f"Binding 1,000 linears by name: {result['bind_1000_linears_seconds']} s. "
        f"Of a compiled call, a linear takes {result['linear_microseconds']} µs and a mark adds "
        f"{result['mark_microseconds']} µs, guards included.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
