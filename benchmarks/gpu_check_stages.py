"""The work of gpu_check.py's stages: python benchmarks/gpu_check_stages.py STAGE --output FILE [--dry-run].

Every figure is a line of FILE as soon as it is known: {"name", "value", "unit", "at_most" or "at_least"}; {"note"} is what
could not be checked, and why. Models are random, of Qwen3's shape; their accuracy says nothing about trained ones.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from judge_gpu import rank_correlation, timed, write_random_model
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import get_compilation_metrics

from g2r_megatron.config.options import JudgeConfig, Layout, Precision, RolloutConfig, TrainConfig
from g2r_megatron.device import on_cpu
from g2r_megatron.judge.frozen import FrozenJudge, Pass
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import MegatronModel, build_model
from g2r_megatron.model.hf import HFModel, open_hf_model
from g2r_megatron.model.schedule import forward_tokens, run_schedule
from g2r_megatron.parallel.groups import build_groups, initialize
from g2r_megatron.plan.activations import Kind
from g2r_megatron.plan.config import GIB, Hardware
from g2r_megatron.plan.cost import backward_flop, forward_flop
from g2r_megatron.plan.models import PlannedModel
from g2r_megatron.plan.rank_memory import training_state, update_bytes
from g2r_megatron.plan.stages import expected_stages
from g2r_megatron.plan.workload import Passes
from g2r_megatron.policy.correction import correct
from g2r_megatron.policy.log_probs import TokenSequence, response_batch
from g2r_megatron.policy.trainer import PolicyTrainer
from g2r_megatron.rollout.megatron import MegatronRolloutEngine
from g2r_megatron.rollout.types import Request
from g2r_megatron.rollout.vllm.environment import check_engine, installed_version
from g2r_megatron.workers import build_engine

TRUE_IDS, FALSE_IDS = [5], [9]
CREDIT = ("credit", "gate branch", "gate all")  # of computed(): contracted gradients, and gates


@dataclass(frozen=True)
class Sizes:
    """Of the model, and of what it is given."""

    hidden: int
    layers: int
    vocab: int
    sequences: int
    tokens: int
    new_tokens: int
    micro_batch_tokens: int


SMALL = Sizes(hidden=512, layers=4, vocab=1024, sequences=6, tokens=160, new_tokens=8, micro_batch_tokens=512)
DRY = Sizes(hidden=128, layers=2, vocab=64, sequences=3, tokens=40, new_tokens=4, micro_batch_tokens=96)
BILLION = Sizes(
    hidden=2048, layers=16, vocab=32768, sequences=32, tokens=1024, new_tokens=128, micro_batch_tokens=16384
)


class Report:
    """The stage's file."""

    def __init__(self, path: Path):
        self.path = path

    def figure(self, name: str, value: float, unit: str = "", **held_to: float) -> None:
        self._write({"name": name, "value": float(value), "unit": unit} | held_to)

    def note(self, text: str) -> None:
        self._write({"note": text})

    def _write(self, line: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def built(hf: HFModel, dtype: str, spec: str) -> MegatronModel:
    return build_model("policy", hf, build_groups("policy", Layout()), Precision(dtype), spec=spec)


def judge_inputs(sizes: Sizes) -> list[JudgeInput]:
    """Sequences of different lengths whose middle half is the response."""
    numbers, inputs = random.Random(1), []
    for i in range(sizes.sequences):
        n = sizes.tokens - i % 4
        ids = [numbers.randrange(10, sizes.vocab) for _ in range(n)]
        inputs.append(JudgeInput(ids, n // 4, 3 * n // 4, n - 1))
    return inputs


def sequences_of(sizes: Sizes) -> list[TokenSequence]:
    return [
        TokenSequence(i.input_ids[: i.response_start], i.input_ids[i.response_start :]) for i in judge_inputs(sizes)
    ]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() @ b.double() / (a.double().norm() * b.double().norm())).item()


# ---- what a model computes --------------------------------------------------------------------------------------------


def train_config(sizes: Sizes) -> TrainConfig:
    config = TrainConfig()
    config.policy.micro_batch_tokens = sizes.micro_batch_tokens
    config.optimizer.distributed, config.optimizer.lr = False, 1e-3
    return config


@torch.no_grad()
def all_logits(model: MegatronModel, sizes: Sizes) -> torch.Tensor:
    """Logits [n, vocab] at the positions of all responses."""
    sequences = sequences_of(sizes)
    batches = [response_batch(model, sequences, [i], sizes.micro_batch_tokens) for i in range(len(sequences))]
    model.train()
    found = run_schedule(model, batches, forward_tokens, lambda _, logits: (None, logits.float()), backward=False)
    return torch.cat(found)[:, : sizes.vocab].cpu()


def credit(model: MegatronModel, sizes: Sizes) -> torch.Tensor:
    """Contracted attributions of all responses, one after the other."""
    options = JudgeConfig(attribution="contracted", target="logit_margin", micro_batch_tokens=sizes.micro_batch_tokens)
    judge, inputs = FrozenJudge(model, options, TRUE_IDS, FALSE_IDS), judge_inputs(sizes)
    judge.verdict_log_probs([[item] for item in inputs])
    return torch.cat([g.dot for g in judge.token_gradients([Pass([item], [True], [1.0]) for item in inputs])])


def gate_credit(model: MegatronModel, sizes: Sizes, queries: str) -> torch.Tensor:
    """Attributions at attention gates of all responses, one after the other; ``queries``: judge.gate_queries."""
    options = JudgeConfig(attribution="gate", gate_queries=queries, target="logit_margin")
    options.micro_batch_tokens = sizes.micro_batch_tokens
    judge, inputs = FrozenJudge(model, options, TRUE_IDS, FALSE_IDS), judge_inputs(sizes)
    if queries == "branch":
        return torch.cat(judge.gates.verdicts([[item] for item in inputs], None)[2])
    judge.verdict_log_probs([[item] for item in inputs])
    return torch.cat(judge.gates.gradients([Pass([item], [True], [1.0]) for item in inputs]))


def update(model: MegatronModel, sizes: Sizes) -> dict[str, torch.Tensor]:
    """One update: the gradient, the change of the weights, the first ratio."""
    trainer, sequences = PolicyTrainer(model, train_config(sizes)), sequences_of(sizes)
    everything = list(range(len(sequences)))
    generator = torch.Generator().manual_seed(3)
    advantages = [torch.randn(len(s.response_ids), generator=generator) for s in sequences]
    parameters = [p for _, p in sorted(model.named_parameters())]
    before = torch.cat([p.detach().float().flatten() for p in parameters])
    old = trainer.log_probs(sequences, [everything])
    metrics = trainer.gradients(sequences, everything, advantages, old, None)
    gradient = torch.cat([p.main_grad.float().flatten() for p in parameters])
    trainer.step(metrics["loss/policy"])
    after = torch.cat([p.detach().float().flatten() for p in parameters])
    ratio = torch.tensor([metrics["ratio/mean"], metrics["ratio/max"]])
    return {"gradient": gradient.cpu(), "change": (after - before).cpu(), "ratio": ratio}


def computed(hf: HFModel, sizes: Sizes, dtype: str, spec: str, report: Report | None = None) -> dict[str, torch.Tensor]:
    """Everything that is compared, of one number format and kind of layers; ``report`` takes the seconds of each part."""

    def of_new_model(name: str, compute: Callable):
        start = time.perf_counter()
        found = compute(built(hf, dtype, spec), sizes)
        if report is not None:
            report.figure(f"{dtype} {spec}: {name}, with compilation", time.perf_counter() - start, "s")
        return found

    parts = {"logits": all_logits, "credit": credit}
    parts |= {f"gate {queries}": partial(gate_credit, queries=queries) for queries in ("branch", "all")}
    return {name: of_new_model(name, part) for name, part in parts.items()} | of_new_model("update", update)


# ---- stages -----------------------------------------------------------------------------------------------------------


def parity(report: Report, sizes: Sizes, directory: Path) -> None:
    """fp32 here against fp32 on the CPU, which the suite holds against Hugging Face."""
    file = directory / "on_cpu.safetensors"
    command = [sys.executable, __file__, "on_cpu", "--output", str(file), "--model", str(directory / "model")]
    command += ["--dry-run"] if sizes is DRY else []
    with subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}) as process:
        found = computed(open_hf_model(str(directory / "model"), "policy.model"), sizes, "fp32", "torch", report)
        if process.wait():
            raise RuntimeError(f"the CPU's process ended with {process.returncode}")
    expected = load_file(file)
    report.figure("logits, relative error", relative(found["logits"], expected["logits"]), at_most=1e-4)
    for name in CREDIT:
        report.figure(f"{name}, relative error", relative(found[name], expected[name]), at_most=1e-3)
    report.figure("gradient, relative error", relative(found["gradient"], expected["gradient"]), at_most=1e-3)
    report.figure("change of the weights, cosine", cosine(found["change"], expected["change"]), at_least=0.99)
    report.figure("first ratio, off 1", (found["ratio"] - 1).abs().max(), at_most=1e-4)


def formats(report: Report, sizes: Sizes, directory: Path) -> None:
    """bf16 in both kinds of layers against fp32 in plain torch."""
    hf = open_hf_model(str(directory / "model"), "policy.model")
    exact = computed(hf, sizes, "fp32", "torch", report)
    for spec in ("torch", "te"):
        if spec == "te" and (on_cpu() or find_spec("transformer_engine") is None):
            report.note("Transformer Engine is not installed, or there is no GPU: its layers are not checked")
            continue
        found = computed(hf, sizes, "bf16", spec, report)
        name = f"bf16 {spec}"
        report.figure(f"{name}: logits, relative error", relative(found["logits"], exact["logits"]), at_most=0.05)
        for kind in CREDIT:
            correlation = rank_correlation(found[kind], exact[kind])
            report.figure(f"{name}: {kind}, rank correlation", correlation, at_least=0.95)
        report.figure(f"{name}: gradient, cosine", cosine(found["gradient"], exact["gradient"]), at_least=0.98)
        report.figure(f"{name}: first ratio, off 1", (found["ratio"] - 1).abs().max(), at_most=0.02)


def compilations(report: Report, sizes: Sizes, directory: Path) -> None:
    """Rows of many lengths through the judge: how often FlexAttention was compiled."""
    if on_cpu():
        report.note("no GPU: FlexAttention is not compiled (tests/unit/test_flex_compilations.py counts on the CPU)")
        return
    model = built(open_hf_model(str(directory / "model"), "policy.model"), "bf16", "torch")
    start = time.perf_counter()
    credit(model, sizes)
    report.figure("seconds of the first passes", time.perf_counter() - start, "s")
    for tokens in (sizes.tokens + 131, 2 * sizes.tokens + 7, 3 * sizes.tokens):
        other = Sizes(**{**vars(sizes), "tokens": tokens, "micro_batch_tokens": 4 * tokens})
        credit(model, other)
    made = [metrics for metrics in get_compilation_metrics() if metrics.co_name == "flex_attention"]
    report.figure("compilations of FlexAttention", len(made), at_most=2)  # with gradients, and without
    start = time.perf_counter()
    credit(model, sizes)
    report.figure("seconds of the same passes again", time.perf_counter() - start, "s")


def speed(report: Report, sizes: Sizes, directory: Path) -> None:
    """Judge, decoding and update of the large model, in the best layers there are."""
    has_te = not on_cpu() and find_spec("transformer_engine") is not None
    spec, dtype = ("te" if has_te else "torch"), ("fp32" if on_cpu() else "bf16")
    report.note(f"layers: {spec}, {dtype}")
    hf = open_hf_model(str(directory / "model"), "policy.model")
    judge_speed(report, built(hf, dtype, spec), sizes)
    decode_speed(report, built(hf, dtype, spec), sizes)
    update_speed(report, built(hf, dtype, spec), sizes, has_te)


def judge_speed(report: Report, model: MegatronModel, sizes: Sizes) -> None:
    """Tokens a second with every item attributed (dense), and with every fourth one (sparse)."""
    options = JudgeConfig(attribution="contracted", target="logit_margin", micro_batch_tokens=sizes.micro_batch_tokens)
    judge, inputs = FrozenJudge(model, options, TRUE_IDS, FALSE_IDS), judge_inputs(sizes)
    tokens = sum(len(item.input_ids) for item in inputs)
    verdicts, _, _ = timed(lambda: judge.verdict_log_probs([[item] for item in inputs]), 2)
    report.figure("judge: verdicts", tokens / verdicts, "tokens/s")
    for name, step in (("dense", 1), ("sparse, a quarter of the items", 4)):
        passes = [Pass([item], [True], [1.0]) for item in inputs[::step]]
        seconds, gib, _ = timed(partial(judge.token_gradients, passes), 2)
        report.figure(f"judge: verdicts and credit, {name}", tokens / (verdicts + seconds), "tokens/s")
        if not on_cpu():
            report.figure(f"judge: peak, {name}", gib, "GiB")


def decode_speed(report: Report, model: MegatronModel, sizes: Sizes) -> None:
    config = RolloutConfig(max_response_tokens=sizes.new_tokens, batch_size=sizes.sequences)
    engine = MegatronRolloutEngine(model, config, {-1})
    requests = [Request(item.input_ids[: sizes.tokens // 4], str(i)) for i, item in enumerate(judge_inputs(sizes))]
    seconds, _, _ = timed(lambda: engine.generate(requests), 1)
    report.figure("decoding", sizes.sequences * sizes.new_tokens / seconds, "tokens/s")


def update_speed(report: Report, model: MegatronModel, sizes: Sizes, has_te: bool) -> None:
    """TFLOP/s by the planner's count, of the bf16 peak of its hardware; memory beside the planner's."""
    before = (
        0 if on_cpu() else torch.cuda.memory_allocated() - sum(p.nbytes for c in model.chunks for p in c.parameters())
    )
    trainer, sequences = PolicyTrainer(model, train_config(sizes)), sequences_of(sizes)
    everything = list(range(len(sequences)))
    advantages = [torch.ones(len(s.response_ids)) for s in sequences]
    old = trainer.log_probs(sequences, [everything])
    # a fused Adam makes its states in its first step
    trainer.step(trainer.gradients(sequences, everything, advantages, old, None)["loss/policy"])
    seconds, gib, _ = timed(lambda: trainer.gradients(sequences, everything, advantages, old, None), 2)
    dtype = "fp32" if on_cpu() else "bf16"
    kind = Kind(dtype, te=has_te, trains=True)
    plan = PlannedModel("policy", model.hf, Layout(), kind, False, 0, 1, expected_stages(model.hf, Layout(), 1))
    rows = max(1, sizes.micro_batch_tokens // sizes.tokens)
    passes = Passes(
        len(trainer.plan(sequences, everything)), rows * sizes.tokens, sizes.tokens / 2, rows * (3 * sizes.tokens // 4)
    )
    tflop = passes.micro_batches * (forward_flop(plan, 0, passes) + backward_flop(plan, 0, passes)) / 1e12
    report.figure("update: forward and backward", tflop / seconds, "TFLOP/s")
    peak = Hardware()
    if on_cpu():
        return
    report.figure("update: MFU of an H100", tflop / seconds / peak.tflops)
    planned = plan.weight_bytes(0) + sum(training_state(plan, 0, False).values())
    planned += sum(update_bytes(plan, 0, passes).values())
    report.figure("update: peak", gib - before / GIB, "GiB")
    report.figure("update: peak, as planned", planned / GIB, "GiB")
    report.figure("update: measured to planned", (gib - before / GIB) * GIB / planned, at_least=0.75, at_most=1.25)


def vllm(report: Report, sizes: Sizes, directory: Path) -> None:
    """Weights to a vLLM engine in this process (its start compares them, changed visibly); its log-probs and its speed."""
    if installed_version() is None:
        report.note("vLLM is not installed: nothing to check")
        return
    dtype = "fp32" if on_cpu() else "bf16"
    hf, config = open_hf_model(str(directory / "model"), "policy.model"), train_config(sizes)
    config.rollout = RolloutConfig(
        engine="vllm",
        batch_size=sizes.sequences,
        max_prompt_tokens=sizes.tokens,
        max_response_tokens=sizes.new_tokens,
    )
    config.rollout.vllm.options = {"enforce_eager": True}  # a start without captured graphs takes seconds
    config.policy.precision = Precision(dtype)
    check_engine(hf, config.rollout, dtype)
    trainer = PolicyTrainer(built(hf, dtype, "torch"), config)
    start = time.perf_counter()
    engine = build_engine(config, trainer, set())
    report.figure("start, with the check of the weights", time.perf_counter() - start, "s")
    prompts = [Request(item.input_ids[: sizes.tokens // 4], str(i)) for i, item in enumerate(judge_inputs(sizes))]
    seconds, _, sampled = timed(lambda: engine.generate(prompts), 2)
    report.figure("decoding", sizes.sequences * sizes.new_tokens / seconds, "tokens/s")
    seconds, _, _ = timed(engine.take_weights, 2)
    report.figure("new weights", seconds, "s")
    sequences = [TokenSequence(r.prompt_ids, s.token_ids) for r, s in zip(prompts, sampled, strict=True)]
    ours = trainer.log_probs(sequences, [list(range(len(sequences)))])
    apart = correct(ours, [torch.tensor(s.log_probs) for s in sampled], config.rollout).metrics["rollout/sync_error"]
    report.figure("log-probs of sampled tokens, mean difference", apart, at_most=1e-3 if dtype == "fp32" else 0.05)


STAGES: dict[str, Callable[[Report, Sizes, Path], None]] = {
    "parity": parity,
    "formats": formats,
    "compilations": compilations,
    "speed": speed,
    "vllm": vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "on_cpu"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="of on_cpu: the directory that the other process has written")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    sizes = DRY if arguments.dry_run else BILLION if arguments.stage == "speed" else SMALL
    initialize(seed=1)
    if arguments.stage == "on_cpu":
        save_file(computed(open_hf_model(arguments.model, "policy.model"), sizes, "fp32", "torch"), arguments.output)
        return
    with tempfile.TemporaryDirectory() as directory:
        write_random_model(SimpleNamespace(**vars(sizes)), str(Path(directory, "model")))
        STAGES[arguments.stage](Report(arguments.output), sizes, Path(directory))


if __name__ == "__main__":
    main()
