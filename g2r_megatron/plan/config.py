"""The options of `g2r plan`: those of training, the machine, and what data files would tell."""

from dataclasses import dataclass, field

from g2r_megatron.config.options import TrainConfig

GIB = 1024**3


@dataclass
class Hardware:
    """One GPU and its links; the defaults are an H100 SXM in a node of 8 with a 400 Gbit/s port for each."""

    memory_gib: float = 79.0
    """device memory"""
    reserve_gib: float = 6.0
    """of it for the CUDA context, NCCL's buffers, workspaces and the allocator's fragments"""
    tflops: float = 989.0
    """dense bf16 TFLOP/s; FP8 is counted at the same speed"""
    fp32_tflops: float = 67.0
    """TFLOP/s of a model in fp32"""
    mfu: float = 0.4
    """share of these that forward and backward passes reach"""
    memory_gb_s: float = 3350.0
    """bandwidth of the device memory, GB/s"""
    memory_use: float = 0.6
    """share of it that decoding reaches"""
    nvlink_gb_s: float = 450.0
    """bandwidth of a GPU to the others of its node, GB/s in one direction"""
    network_gb_s: float = 50.0
    """bandwidth of a GPU to other nodes, GB/s in one direction"""
    host_gb_s: float = 50.0
    """bandwidth of a GPU to host memory, GB/s in one direction (judge.offload)"""
    link_use: float = 0.7
    """share of these three that transfers reach"""
    launch_us: float = 18.0
    """microseconds of the host for one operation (measured: 18); decoding, without CUDA graphs, takes at least that for each"""


@dataclass
class PlanConfig(TrainConfig):
    """Everything `g2r plan` reads: a training config and what follows."""

    nodes: int = 1
    """nodes of the job"""
    gpus_per_node: int = 8
    """GPUs, and ranks, of a node"""
    rubric_items: int = 12
    """criteria of a response"""
    criterion_tokens: int = 110
    """tokens that a criterion adds to the judge's input, with what follows it"""
    attributed_share: float = 0.5
    """share of the items that need a backward pass (judged True, and not alike in their group)"""
    prompt_spread: float = 0.5
    """a step's prompts are evenly between rollout.max_prompt_tokens and this share of it less (rollouts: time only)"""
    suggest: bool = False
    """list workable layouts for the nodes, the cheapest estimated step first"""
    json: bool = False
    """print the plan as JSON"""
    hardware: Hardware = field(default_factory=Hardware)
