"""The options of `g2r judge`, `g2r probe` and `g2r eval`, as those of training are in options.py."""

from dataclasses import dataclass, field
from typing import Literal

from g2r_megatron.config.options import (
    JudgeConfig,
    Layout,
    Precision,
    RolloutConfig,
    VerdictJudgeConfig,
    VerifierConfig,
)

# what g2r probe measures: attributions, gates by whose attention they multiply
Probed = Literal[
    "gate_branch", "gate_all", "contracted", "grad_x_embed", "grad_norm_product", "attention", "occlusion", "l1", "l2", "null_token"
]  # fmt: skip


OutputFormat = Literal["jsonl", "parquet", "trl"]


@dataclass
class OfflineJudgeConfig:
    """Everything `g2r judge` reads."""

    input: str = ""
    """rows, in files as data.train: a query plus "response", or outputs of other tools (vLLM, OpenAI batches)"""
    queries: list[str] = field(default_factory=list)
    """files of the queries, where the rows of input hold only their ids (custom_id) and responses"""
    output: str = ""
    """file to write; must not exist. What a killed process has done of it is kept, and the same command goes on from there"""
    format_out: OutputFormat = "jsonl"
    """of output: jsonl; parquet, whose columns `datasets` loads; trl: parquet with prompt and completion as TRL's trainers read them"""
    shards: int = 1
    """jobs that share the rows, each run with its own `shard`; the last one to finish writes `output`"""
    shard: int = 0
    """which of the `shards` this is, from 0; one that is finished already ends at once"""
    dump_inputs: bool = False
    """also write per item input_ids, response_start, response_end, verdict_position (or score_position), true_ids, false_ids"""
    batch_rows: int = 64
    """rows judged and written at a time"""
    seed: int = 1234
    """of sampled verdicts"""
    format: Literal["auto", "g2r", "healthbench", "rar", "researchqa"] = "auto"
    """as data.format"""
    fields: dict[str, str] = field(default_factory=dict)
    """as data.fields, and of response"""
    polarity: Literal["raw", "flip_negated"] | None = None
    """as data.polarity"""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """as data.on_bad_row"""
    preset: Literal["paper", "robust"] = "paper"
    """fills judge.target, attribution, normalize, standardize and smoothing where they are not given"""
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class SampledPolicyConfig:
    """The model that responses are sampled from."""

    model: str = ""
    """Hugging Face directory, Megatron checkpoint, or output_dir of a g2r train run (its newest checkpoint)"""
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    spec: Literal["auto", "torch", "te"] = "auto"
    """as policy.spec of g2r train"""


@dataclass
class ProbeConfig:
    """Everything `g2r probe` reads."""

    input: str = ""
    """rows, as of g2r judge: a query and its "response", or outputs of other tools; policy.model answers those without a response"""
    output: str = ""
    """directory to write probe.json and probe.html to; the same command goes on with a probe that was stopped"""
    sample: int = 40
    """pairs of a response and a criterion that is judged True to measure, of different responses as far as there are; of a reward
    model: responses"""
    false_sample: int = 0
    """pairs judged False to measure beside them"""
    attributions: list[Probed] = field(
        default_factory=lambda: [
            "gate_branch",
            "gate_all",
            "contracted",
            "grad_x_embed",
            "grad_norm_product",
            "attention",
        ]
    )
    """what to measure; the first one also with its sentences shuffled, as a placebo"""
    seed: int = 1234
    """of the sample, the placebo and the intervals"""
    format: Literal["auto", "g2r", "healthbench", "rar", "researchqa"] = "auto"
    """as data.format"""
    queries: list[str] = field(default_factory=list)
    """files of the queries, where the rows of input hold only their ids (custom_id) and responses"""
    fields: dict[str, str] = field(default_factory=dict)
    """as data.fields, and of response"""
    polarity: Literal["raw", "flip_negated"] | None = None
    """as data.polarity"""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """as data.on_bad_row"""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    policy: SampledPolicyConfig = field(default_factory=SampledPolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class EvalConfig:
    """Everything `g2r eval` reads."""

    data: list[str] = field(default_factory=list)
    """rows to evaluate on: files, directories or glob patterns, as data.train"""
    responses: list[str] = field(default_factory=list)
    """responses to judge instead of those of a policy: rows as the input of g2r judge; with data, their ids are enough"""
    output: str = ""
    """directory of the results; the same command goes on with an evaluation that was stopped"""
    samples: int = 1
    """responses a prompt"""
    greedy: bool = False
    """sample greedily instead of at rollout.temperature"""
    batch_rows: int = 64
    """responses judged and written at a time"""
    seed: int = 1234
    """of the sampling and of the bootstrap"""
    format: Literal["auto", "g2r", "healthbench", "rar", "researchqa", "verifiable"] = "auto"
    """as data.format"""
    fields: dict[str, str] = field(default_factory=dict)
    """as data.fields, and of response"""
    polarity: Literal["raw", "flip_negated"] | None = None
    """as data.polarity"""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """as data.on_bad_row"""
    system_prompt: str = ""
    """as data.system_prompt"""
    policy: SampledPolicyConfig = field(default_factory=SampledPolicyConfig)
    judge: VerdictJudgeConfig = field(default_factory=VerdictJudgeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
