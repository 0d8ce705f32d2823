"""A Hugging Face model directory, or a Megatron checkpoint with one inside: what it is, read and checked."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from g2r_megatron.data.tokenizer_files import has_tokenizer, hide_tokens, load_tokenizer, vocabulary_size
from g2r_megatron.errors import UserError, warn
from g2r_megatron.model.config_file import DUAL_CHUNKS, read_config, read_json
from g2r_megatron.model.families import Family
from g2r_megatron.model.hub_cache import find_directory
from g2r_megatron.model.safetensors_files import SafetensorsReader

__all__ = ["CHECKPOINT_FACTS", "HF_FILES", "Geometry", "HFModel", "load_model_tokenizer", "open_hf_model", "read_json"]

HF_FILES = "hf"  # subdirectory of a Megatron checkpoint with the config and tokenizer of its model
CHECKPOINT_FACTS = "g2r.json"  # our own facts in a Megatron checkpoint


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide every tensor's shape."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    experts: int = 0  # of each mixture-of-experts layer
    expert_ffn: int = 0
    experts_per_token: int = 0
    dense_layers: frozenset[int] = frozenset()  # the layers without experts, in a model with experts
    is_reward_model: bool = False  # a score of one number where a language model has its output layer

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer has no experts."""
        return not self.experts or bool(self.dense_layers)

    def is_moe(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0, over the whole model) has experts."""
        return self.experts > 0 and layer not in self.dense_layers

    def padded_vocab(self, tp: int, dp: int) -> int:
        """Vocabulary rows rounded up so that each TP shard's element count is a multiple of lcm(dp, 128).

        Megatron-Core's distributed optimizer keeps a tied embedding in a gradient bucket of its own, padded to that
        multiple, and its reshardable checkpoints are only right (0.16) when no padding falls inside the buffer.
        """
        alignment = math.lcm(dp, 128)
        multiple = tp * (alignment // math.gcd(alignment, self.hidden))
        return -(-self.vocab // multiple) * multiple


@dataclass(frozen=True)
class HFModel:
    """A validated model. ``option`` is the config option that named it, for error messages.

    ``path``: the directory of config.json and the tokenizer, and of the weights unless there is a ``checkpoint``, the
    Megatron checkpoint that holds them. ``fused_experts``: Hugging Face files store (or stored) all experts of a layer
    in one tensor.
    """

    option: str
    path: Path
    config: PretrainedConfig
    family: Family
    geometry: Geometry
    checkpoint: Path | None = None
    fused_experts: bool = False

    @property
    def architecture(self) -> str:
        """The Hugging Face class of the model."""
        return self.family.reward_architecture if self.geometry.is_reward_model else self.family.architecture

    def rope_table(self) -> tuple[torch.Tensor, float]:
        """RoPE inverse frequencies [head_dim / 2], fp32, and the factor of its sines and cosines.

        Both from transformers' own functions. Dynamic NTK is the unscaled table up to ``max_position_embeddings``, and
        longer sequences are refused (``check_positions``).
        """
        rope = self.config.rope_parameters
        if rope["rope_type"] in ("default", "dynamic"):
            exponent = torch.arange(0, self.geometry.head_dim, 2, dtype=torch.int64).float() / self.geometry.head_dim
            return 1.0 / (rope["rope_theta"] ** exponent), 1.0
        with torch.device("cpu"):  # a caller that builds on the meta device needs their values too
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, "cpu")

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory holds a tokenizer's files."""
        return has_tokenizer(self.path)

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence that the model was made for, after YaRN's extension.

        Dual chunk attention (Qwen2.5-1M) is plain attention up to the size of a chunk, and that counts.
        """
        rope, stated = self.config.rope_parameters, self.config.max_position_embeddings
        if rope["rope_type"] == "yarn" and rope.get("factor"):
            stated = max(stated, int(rope["factor"] * rope["original_max_position_embeddings"]))
        return min(stated, self._chunk) if self._chunk else stated

    @property
    def _chunk(self) -> int:
        """Tokens up to which dual chunk attention is plain attention; 0 for a model without it."""
        chunks = getattr(self.config, DUAL_CHUNKS, None)
        return chunks["chunk_size"] - chunks["local_size"] if chunks else 0

    @property
    def ends_at_positions(self) -> bool:
        """Whether longer sequences than ``positions`` are refused: dynamic NTK and dual chunks would change all angles."""
        return self.config.rope_parameters["rope_type"] == "dynamic" or bool(self._chunk)

    def check_positions(self, tokens: int, what: str) -> None:
        """Warn when ``what`` (options or a row) allows sequences longer than the model's; refuse if it ends there."""
        if tokens <= self.positions:
            return
        of = DUAL_CHUNKS if self._chunk == self.positions else "max_position_embeddings"
        found = f"allows {tokens} tokens, while {self.option} was made for {self.positions} ({of})"
        if self.ends_at_positions:
            which = DUAL_CHUNKS if self._chunk else "rope type dynamic"
            remedy = f"its {which} changes all angles beyond them, which is not supported: allow fewer"
            raise UserError(what, found, remedy)
        warn(f"{what} {found}: what it computes beyond them is untrained")

    @property
    def sliding_window(self) -> tuple[int, list[bool]] | None:
        """(positions a token sees, itself included; which layers have the window), or None without any."""
        width = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        layers = [types is None or t == "sliding_attention" for t in types or [None] * self.geometry.layers]
        return (width, layers) if width is not None and any(layers) else None


def open_hf_model(path: str, option: str) -> HFModel:
    """Read and check ``config.json`` of a Hugging Face directory or of a Megatron checkpoint's ``hf/``.

    ``path`` can be a model's name on the Hugging Face Hub that is in the local cache. Raises ``UserError`` for anything
    that we would not convert exactly.
    """
    directory = find_directory(path, option)
    if (directory / ".metadata").is_file() or (directory / CHECKPOINT_FACTS).is_file():
        return _open_checkpoint(directory, option)
    hf = _open_config(directory, option)
    if hf.geometry.experts and any(directory.glob("*.safetensors")):
        hf = dataclasses.replace(hf, fused_experts=_has_fused_experts(hf, SafetensorsReader(directory).names))
    return hf


def _open_checkpoint(checkpoint: Path, option: str) -> HFModel:
    """The model of a Megatron checkpoint, from a conversion or from training."""
    if not (checkpoint / HF_FILES / "config.json").is_file():
        raise UserError(
            option,
            f"{checkpoint} is a Megatron checkpoint without {HF_FILES}/config.json",
            f"copy config.json and the tokenizer of the model it was made from to {checkpoint / HF_FILES}",
        )
    facts = read_json(checkpoint / CHECKPOINT_FACTS)
    hf = _open_config(checkpoint / HF_FILES, option)
    return dataclasses.replace(hf, checkpoint=checkpoint, fused_experts=bool(facts.get("fused_experts")))


def _open_config(directory: Path, option: str) -> HFModel:
    found = read_config(directory, option)
    geometry = _geometry(found.config, found.family, found.is_reward_model)
    return HFModel(option, directory, found.config, found.family, geometry)


def _geometry(config: PretrainedConfig, family: Family, is_reward_model: bool) -> Geometry:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    experts, expert_ffn, chosen, dense = 0, 0, 0, frozenset()
    if family.experts is not None:
        experts, chosen = config.num_local_experts, config.num_experts_per_tok
        expert_ffn = getattr(config, "moe_intermediate_size", config.intermediate_size)
        every = getattr(config, "decoder_sparse_step", 1)
        dense = frozenset(i for i in range(layers) if (i + 1) % every) | set(getattr(config, "mlp_only_layers", []))
    return Geometry(
        layers=layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings) and not is_reward_model,
        experts=experts,
        expert_ffn=expert_ffn,
        experts_per_token=chosen,
        dense_layers=frozenset(dense),
        is_reward_model=is_reward_model,
    )


def _has_fused_experts(hf: HFModel, names: set[str]) -> bool:
    fused = {name for m in hf.family.fused_experts.values() if m.fused for name in m.hf}
    endings = tuple(name.format(i=i) for name in fused for i in range(hf.geometry.layers))
    return any(name.endswith(endings) for name in names)


def load_model_tokenizer(hf: HFModel) -> PreTrainedTokenizerFast:
    """The directory's tokenizer. It encodes texts only to ids that the model has embeddings for.

    Added tokens beyond them (a padding token, say, for which the embedding was never resized) are hidden, with a
    warning: no text is encoded to them. Raises ``UserError`` for words of the vocabulary beyond them, and for added
    tokens that every prompt or response would need.
    """
    tokenizer, rows = load_tokenizer(hf.path), hf.geometry.vocab
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return tokenizer
    if ordinary := beyond.keys() - tokenizer.get_added_vocab().keys():
        raise UserError(
            hf.option,
            f"the tokenizer of {hf.path} has {vocabulary_size(tokenizer)} tokens, the model {rows} "
            f"({min(ordinary, key=beyond.get)!r} is {beyond[min(ordinary, key=beyond.get)]})",
            "give the directory of a model with its own tokenizer",
        )
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    for token, number in sorted(beyond.items(), key=lambda item: item[1]):
        if token in needed or token in str(tokenizer.chat_template or ""):
            raise UserError(
                hf.option,
                f"token {token!r} of {hf.path} is {number}, but the model has embeddings for {rows} tokens",
                "resize them (resize_token_embeddings of transformers), train the new ones, and save the model again",
            )
    hide_tokens(tokenizer, list(beyond))
    listed = ", ".join(sorted(beyond, key=beyond.get)[:5])
    warn(f"{hf.path}: {len(beyond)} tokens have no embedding ({rows} rows) and are never used: {listed}")
    return tokenizer
