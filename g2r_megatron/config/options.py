"""Every option of g2r, one dataclass per concern.

``g2r train --config FILE --policy.layout.tp 2`` fills ``TrainConfig``; the comment string under a field is
its ``--help`` text. An option whose default is ``None`` "follows the preset" takes its value from
``PRESETS[grpo.preset]`` (presets.py); ``resolve_preset`` fills it in, and the resolved file is saved with the run.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from g2r_megatron.config.alarm_options import AlarmsConfig

Attribution = Literal[
    "grad_x_embed", "l1", "l2", "contracted", "gate", "grad_norm_product", "null_token", "attention", "occlusion", "uniform"
]  # fmt: skip
Target = Literal["log_prob", "logit_margin"]
Dtype = Literal["fp32", "bf16"]
Smoothing = Literal["none", "smear", "sentence"]
Normalize = Literal["softmax", "positive"]
Credit = Literal["per_item", "per_response"]
Engine = Literal["megatron", "vllm"]
Correction = Literal["none", "tis", "icepop", "sequence"]
AdvantageKind = Literal["sequence", "token_return", "itemwise", "sequence_weighted"]

DEFAULT_JUDGE_TEMPLATE = """Below are a conversation, a response to it, and one criterion. Decide whether the response meets the criterion.

# Conversation
{conversation}

# Response
{response}

# Criterion
{criterion}

Does the response meet the criterion? Answer True or False only."""


@dataclass
class Layout:
    """How one model is spread over the ranks; what is left over is data parallel."""

    tp: int = 1
    """tensor parallel size"""
    pp: int = 1
    """pipeline parallel size"""
    vpp: int | None = None
    """virtual pipeline stages a rank (interleaved schedule; needs pp of 3 or more)"""
    stage_layers: list[int] | None = None
    """layers of each (virtual) pipeline stage, in the order of the layers; default: the same for all"""
    cp: int = 1
    """context parallel size: ranks that share each row of judge tokens (judge.layout only; the policy's must be 1)"""
    ep: int = 1
    """expert parallel size"""
    etp: int = 1
    """expert tensor parallel size; experts have a split of their own over the ranks of a pipeline stage"""
    sp: bool = False
    """sequence parallelism (shards activations over the tensor parallel ranks; needs tp > 1)"""


@dataclass
class Precision:
    """Numeric formats of one model."""

    dtype: Dtype = "fp32"
    """bf16 is Megatron's mixed precision: bf16 compute, fp32 main weights and gradients"""
    fp8: Literal["none", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Transformer Engine FP8 recipe, scaled from the tensors at hand (GPU only, with dtype bf16)"""


@dataclass
class PolicyConfig:
    """The model that is trained."""

    model: str = ""
    """Hugging Face directory (safetensors) the policy starts from"""
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    recompute: Literal["none", "selective", "full"] = "none"
    """activation recompute: none, the feed-forward part of dense layers, or whole layers; g2r plan --suggest chooses"""
    micro_batch_tokens: int = 8192
    """token budget of a micro-batch, a row of packed sequences; a longer sequence is a micro-batch of its own"""
    spec: Literal["auto", "torch", "te"] = "auto"
    """layers: plain torch or Transformer Engine (TF32 in fp32); auto: Transformer Engine on GPU, except in fp32"""


@dataclass
class JudgeConfig:
    """The frozen judge and how its gradient becomes token weights."""

    model: str | None = None
    """Hugging Face directory of the judge, a language model or a reward model (...ForSequenceClassification of one
    label); none: the frozen initial policy judges itself"""
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    recompute: Literal["none", "selective", "full"] = "none"
    """activation recompute in the attribution backward"""
    micro_batch_tokens: int = 8192
    """token budget of a micro-batch, before layout.cp splits it; what the items of a response share counts once"""
    spec: Literal["auto", "torch", "te"] = "auto"
    """layers: plain torch or Transformer Engine (TF32 in fp32); auto: Transformer Engine on GPU, except in fp32"""
    ranks: int = 0
    """the last so many ranks of the job are the judge's and the others the policy's; 0: all ranks run both"""
    parts: int | None = None
    """a step's prompts go to the judge in so many parts, each as soon as it is sampled; none: 4 with judge.ranks, else 1"""
    offload: bool = False
    """keep the judge's weights in host memory while the policy samples and updates (without judge.ranks)"""
    template: str = DEFAULT_JUDGE_TEMPLATE
    """judge prompt; must contain {conversation}, {response}, {criterion} once each, in any order (the criterion last is
    cheapest: the items of a response then share what stands before it)"""
    chat_template: bool = True
    """wrap the judge prompt in the tokenizer's chat template (off for a tokenizer without one)"""
    template_options: dict[str, Any] = field(default_factory=dict)
    """go to the judge's chat template, also a reward model's, e.g. {reasoning_effort: low}; chat_template: NAME chooses one
    of several; thinking is off (enable_thinking, thinking) unless it is given here"""
    think: Literal["close", "refuse"] = "close"
    """where the chat template opens a thought before the verdict: close it first, or refuse the judge"""
    true_words: list[str] = field(default_factory=lambda: ["True", "true", "TRUE"])
    """spellings of a positive verdict; each also with a leading space; those that are one token count"""
    false_words: list[str] = field(default_factory=lambda: ["False", "false", "FALSE"])
    """spellings of a negative verdict"""
    max_length: int = 32768
    """longest judge input in tokens; a longer one is an error that names the row. Items of a response run as one input
    up to this length (with credit=per_response always)"""
    verdict: Literal["compare", "sample"] = "compare"
    """verdict by p(True) > p(False), or sampled with p(True) / (p(True) + p(False))"""
    target: Target | None = None
    """what is differentiated: log p(verdict) or logit(True) - logit(False) (follows the preset); a reward model's score
    is its own target"""
    attribution: Attribution | None = None
    """b_t: g.e, L1 or L2 norm of g, g.(e - mean) at the contracted embedding, the gradient at the gates that multiply the
    attention weights of t, L2 norm of the elementwise product of g and e, g.(e - e of the pad token), the attention that the
    verdict position pays t, what the target loses when t's sentence is hidden (occlusion), or none (uniform) (follows the
    preset)"""
    gate_queries: Literal["branch", "all"] | None = None
    """whose attention weights `gate` multiplies: those of what follows the response (all items in one backward with the
    verdicts), or of all tokens after t; none: branch, for a reward model all"""
    gate_levels: list[float] = field(default_factory=lambda: [1.0])
    """the gates m in (0, 1] at which `gate` takes the gradient; b is their mean. Verdicts are always at 1"""
    credit: Credit = "per_item"
    """one backward for each item, or one for the weighted mean of a response's items, which then have one alpha"""
    contraction: float = 0.15
    """s of `contracted`: response embeddings are moved to mean + s (e - mean) for the gradient"""
    normalize: Normalize | None = None
    """how b becomes alpha: softmax(b), or max(b, 0) divided by its sum, over sentences where smoothing=sentence (follows
    the preset)"""
    tau: float = 1.0
    """temperature of normalize=softmax"""
    standardize: bool | None = None
    """b to mean 0, std 1 over the response before the softmax of normalize=softmax (follows the preset)"""
    smoothing: Smoothing | None = None
    """alpha unchanged, smeared backwards, or the same for all tokens of a sentence (follows the preset)"""
    smear_gamma: float = 0.7
    """decay of `smoothing=smear`"""
    shuffle: bool = False
    """a placebo: the alpha of whole sentences (of tokens, unless smoothing=sentence) in a random order"""
    flat_threshold: float = 0.95
    """a response with ESS/T above this counts as flat in the metrics"""


@dataclass
class VerdictJudgeConfig:
    """A judge that gives verdicts and no credit. Options as of `judge` in g2r train."""

    model: str | None = None
    """Hugging Face directory of the judge, a language model"""
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    micro_batch_tokens: int = 8192
    """as judge.micro_batch_tokens"""
    spec: Literal["auto", "torch", "te"] = "auto"
    """as judge.spec"""
    template: str = DEFAULT_JUDGE_TEMPLATE
    """as judge.template"""
    chat_template: bool = True
    """as judge.chat_template"""
    template_options: dict[str, Any] = field(default_factory=dict)
    """as judge.template_options"""
    think: Literal["close", "refuse"] = "close"
    """as judge.think"""
    true_words: list[str] = field(default_factory=lambda: ["True", "true", "TRUE"])
    """as judge.true_words"""
    false_words: list[str] = field(default_factory=lambda: ["False", "false", "FALSE"])
    """as judge.false_words"""
    max_length: int = 32768
    """as judge.max_length"""


def gated_queries(judge: JudgeConfig, is_reward_model: bool = False) -> str | None:
    """What ``judge.gate_queries`` means: None without gates; a reward model may read its score where the response ends."""
    if judge.attribution != "gate":
        return None
    return judge.gate_queries or ("all" if is_reward_model else "branch")


GPU_SHARE = 0.4  # of a GPU's memory for a vLLM engine beside the policy, unless rollout.vllm.options say otherwise


@dataclass
class VLLMConfig:
    """Where vLLM runs (rollout.engine vllm)."""

    mode: Literal["colocated", "servers"] = "colocated"
    """an engine in each of the policy's ranks, or vLLM servers that are running (tools/vllm_server.sh)"""
    options: dict[str, Any] = field(default_factory=dict)
    """vLLM's own engine options, e.g. {gpu_memory_utilization: 0.4}; vLLM checks them (mode=colocated)"""
    urls: list[str] = field(default_factory=list)
    """of the servers, e.g. ["http://127.0.0.1:8000"] (mode=servers)"""
    behind_proxy: bool = False
    """accept servers that do not listen on loopback: each stands behind a proxy that lets in this job alone"""


@dataclass
class RolloutConfig:
    """Sampling of responses."""

    engine: Engine = "megatron"
    """Megatron-Core on the policy's own weights, or vLLM, which gets them after every update"""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    prompts_per_step: int = 32
    """prompts a training step"""
    responses_per_prompt: int = 8
    """group size G"""
    temperature: float = 1.0
    """0 is greedy"""
    top_p: float = 1.0
    """nucleus sampling; 1 is off"""
    top_k: int = 0
    """0 is off"""
    max_prompt_tokens: int = 2048
    """longer prompts are an error that names the query"""
    max_response_tokens: int = 1024
    """responses are cut here"""
    stop: list[str] = field(default_factory=list)
    """further stop tokens (single tokens); end-of-sequence and the chat template's end of turn always stop"""
    batch_size: int = 64
    """sequences decoded together on a data-parallel rank"""
    correction: Correction = "none"
    """of the sampler's log-probs against the trainer's, for engine=vllm, by rho = p trainer / p sampler: tis multiplies a
    token's loss by min(rho, high), icepop by rho and leaves out tokens with rho outside [low, high], sequence leaves out
    responses whose geometric mean of rho is outside"""
    correction_bounds: list[float] | None = None
    """[low, high] of rho; none: [0, 2] for tis, [0.5, 5] for icepop, [0.99, 1.01] for sequence"""
    dump: str = ""
    """directory for every response of the run, with tokens, log-probs, scores and verdicts"""
    replay: str = ""
    """directory that another run has dumped: train from its responses, and sample nothing"""
    chat_template: bool = True
    """render the conversation with the tokenizer's chat template (off for a tokenizer without one)"""
    template_options: dict[str, Any] = field(default_factory=dict)
    """go to the chat template, e.g. {enable_thinking: false}; chat_template: NAME chooses one of several"""
    think_end: str = "auto"
    """what ends a thought: judge and report see what follows it, and the thought's tokens get the sequence's advantage.
    auto finds the mark in the template or the tokenizer; none: responses have no thoughts"""


@dataclass
class GrpoConfig:
    """Advantages and loss. Paper: arXiv 2602.01791."""

    preset: Literal["robust", "paper", "grpo"] = "robust"
    """grpo: sequence-level; paper: the published estimator; robust: item-wise, by gates and sentences (default)"""
    advantage: AdvantageKind | None = None
    """estimator (follows the preset)"""
    return_to_go: bool | None = None
    """sum token rewards from t on, for advantage=token_return (follows the preset)"""
    baseline: Literal["group", "rloo"] = "group"
    """group mean, or leave-one-out mean of the other responses"""
    normalize_std: bool = True
    """divide by the group's standard deviation"""
    mix: float | None = None
    """m: weight of alpha against uniform, m alpha + (1 - m)/T (follows the preset)"""
    mix_anneal: float | None = None
    """m falls linearly to 0 at this fraction of training; 0 keeps it constant (follows the preset)"""
    weight_clip: list[float] | None = None
    """[low, high] bounds of T alpha, e.g. [0.5, 2.0]"""
    top_items: float = 1.0
    """fraction of items a response, by size of centred term, that keep their attribution; rounded up to whole items"""
    false_scale: float = 1.0
    """factor on the centred terms of items judged False, or of scores below the group's mean (advantage=itemwise)"""
    clip_low: float = 0.2
    """ratio clip: 1 - clip_low"""
    clip_high: float = 0.2
    """ratio clip: 1 + clip_high"""
    kl_coef: float = 0.0
    """coefficient of the KL penalty to the frozen initial policy"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """of the KL penalty: k1 = log p - log ref, k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1"""
    loss_aggregation: Literal["seq_mean", "token_mean", "dr_grpo"] = "seq_mean"
    """mean over tokens then sequences (paper); mean over all tokens; sum / (sequences x max_response_tokens)"""
    mini_batches: int = 1
    """optimizer steps a training step; must divide its responses evenly"""

    @property
    def credits_tokens(self) -> bool:
        """Whether the tokens of a response get advantages of their own, at least in the first steps."""
        return self.advantage != "sequence" and bool(self.mix)


@dataclass
class OptimizerConfig:
    """Megatron-Core's Adam, schedule and clipping."""

    lr: float = 1e-6
    """learning rate after the warm-up"""
    min_lr: float = 0.0
    """where the decay ends"""
    warmup_steps: int = 0
    """training steps of linear warm-up"""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """of the learning rate, over the steps after the warm-up"""
    weight_decay: float = 0.0
    """decoupled, as in AdamW"""
    beta1: float = 0.9
    """Adam's decay of the mean gradient"""
    beta2: float = 0.95
    """Adam's decay of the mean square gradient"""
    eps: float = 1e-8
    """Adam's floor of the denominator"""
    clip_grad: float = 1.0
    """global gradient norm bound; 0 is off"""
    distributed: bool = True
    """shard optimizer state over data-parallel ranks"""
    max_bad_steps: int = 3
    """so many optimizer steps in a row may be skipped because loss or gradients are not finite; then the run stops"""


@dataclass
class DataConfig:
    """Queries."""

    train: list[str] = field(default_factory=list)
    """training queries: files (jsonl, json, parquet, csv, tsv, arrow; also .gz, .zst), directories, glob patterns"""
    format: Literal["auto", "g2r", "healthbench", "rar", "researchqa", "verifiable"] = "auto"
    """auto knows the field names of many projects; others take the names of one data set only"""
    fields: dict[str, str] = field(default_factory=dict)
    """other field names, dotted where nested, e.g. {prompt: meta.task, weight: importance}; of prompt, system, rubric,
    criterion, weight, tags, id, reference, answer"""
    polarity: Literal["raw", "flip_negated"] | None = None
    """negative-weight items phrased "does not ..." (met is good, RaR-Science): raw keeps the sign, flip_negated makes them
    positive; not given: as raw, but items weighted "Pitfall" without a number are refused"""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """a row that cannot be used ends the start of the run, or is left out with a warning (up to 5% of the rows)"""
    system_prompt: str = ""
    """system message of every conversation that does not begin with one of its own"""
    shuffle: bool = True
    """order is a function of the seed and the step; off keeps file order"""


@dataclass
class VerifierConfig:
    """What decides whether a response to a row with an `answer` is right, which is its reward."""

    kind: Literal["math", "choice", "exact", "regex", "command"] = "math"
    """compares the final answer, in \\boxed{} or after ####: as mathematics (math-verify), as a letter, as text, as a match
    of the regular expression `answer`; or command"""
    command: list[str] = field(default_factory=list)
    """a program and its arguments, for kind=command: reads {id, messages, response, answer} as JSON, exits with 0 for right"""
    timeout_seconds: float = 10.0
    """a decision may take; then the answer is wrong"""
    memory_mib: int = 2048
    """address space of the program"""
    criterion: str = "The solution is correct and its final answer is right."
    """what the judge is asked, for credit: its gradient counts where its verdict agrees with the verifier's. {answer} stands
    for the row's answer"""


@dataclass
class HeldOutConfig:
    """Evaluations of a training, on rows that it does not train on."""

    data: list[str] = field(default_factory=list)
    """held-out queries, as data.train"""
    every: int = 0
    """steps between evaluations; 0: only before and after training"""
    patience: int = 0
    """so many evaluations in a row whose checkpoint.keep_best is not above its best end the run; 0: never"""
    samples: int = 1
    """responses a prompt"""
    greedy: bool = False
    """sample greedily instead of as the rollout"""
    judge: VerdictJudgeConfig = field(default_factory=VerdictJudgeConfig)
    """the gold judge: another model than the judge that training learns from, so that what exploits that one shows"""


@dataclass
class CheckpointConfig:
    """What is saved, and how often."""

    save_every: int = 20
    """steps; 0 saves only at the end"""
    keep_last: int = 2
    """older checkpoints are deleted after a successful save"""
    keep_best: str = ""
    """name of a metric of evaluations, e.g. eval/gold_score: the step with its highest value so far is saved and kept too"""
    asynchronous: bool = True
    """training goes on while a checkpoint is written; takes a copy of the saved state in host memory"""
    export_hf: bool = True
    """write a Hugging Face directory at the end of training"""


@dataclass
class LogConfig:
    """Records beside metrics.jsonl."""

    tensorboard: bool = True
    """write TensorBoard events to OUTPUT_DIR/tensorboard"""
    wandb: bool = False
    """needs the wandb package"""
    wandb_project: str = "g2r-megatron"
    """W&B project of the run"""
    samples_per_step: int = 2
    """most responses of a logged step that are kept in samples.jsonl for the report, one a prompt"""
    samples_every: int = 10
    """steps between logged samples"""


@dataclass
class TrainConfig:
    """Everything `g2r train` reads."""

    output_dir: str = ""
    """run directory; an unfinished run there is resumed"""
    steps: int = 100
    """training steps in all"""
    seed: int = 1234
    """of the order of the data, the sampling and the sampled verdicts"""
    deterministic: bool = False
    """the same job gives the same bits on a GPU too, with slower kernels (on a CPU it does anyway)"""
    timeout_minutes: float = 30.0
    """a rank that waits for longer than this for another one ends the run: it is dead or stuck; so is a vLLM server, which is
    given up"""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: HeldOutConfig = field(default_factory=HeldOutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)

    def evaluates_after(self, step: int) -> bool:
        """Whether ``eval.data`` is evaluated after ``step``; 0: before training."""
        return step in (0, self.steps) or bool(self.eval.every and step % self.eval.every == 0)

    @property
    def needs_old_pass(self) -> bool:
        """Whether an update needs log-probs from before it, and so a pass for them; else its own forward gives them."""
        return self.grpo.mini_batches > 1 or self.rollout.correction != "none"
