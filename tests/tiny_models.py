"""Tiny random Hugging Face models with their tokenizer, built in a second: what the tests load instead of real ones.

Every weight is random, biases and norms too, so that one which is lost or transposed on the way shows in the numbers.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

DENSE_FAMILIES = ("qwen2", "qwen3", "llama3")  # without sliding windows
FAMILIES = (*DENSE_FAMILIES, "mistral", "qwen3_moe", "mixtral")

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
CORPUS = [
    "user assistant system The answer is True or False . true false\nTrue\nFalse\ntrue\nfalse\n",
    "Below are a conversation, a response to it, and one criterion. Does the response meet the criterion?\n",
    "A note on fever and rash: rest, drink water, see a doctor if it lasts longer than three days.\n",
] * 10
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# family -> its model_type and what its config adds to ``SHAPE``
CONFIGS = {
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),  # QKV bias
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=False),  # q/k norm
    "llama3": dict(model_type="llama", rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False),
    "llama_yarn": dict(model_type="llama", rope_parameters=YARN_ROPE, tie_word_embeddings=False),
    "mistral": dict(model_type="mistral", sliding_window=24, tie_word_embeddings=False),
    "qwen3_moe": dict(
        model_type="qwen3_moe",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
}
SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.1,
    dtype="float32",
)
ROUTER_STD = 0.25  # router logits of the normalised 64 hidden values then differ by about 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE for any text with a ChatML chat template; the verdict words are one token each.

    It has 383 tokens, a prime, so that a vocabulary split over ranks is padded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=401,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def write_vocabulary(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """The tokenizer's vocab.json and merges.txt, as they were before tokenizer.json."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")


def build_model(family: str, vocab: int, seed: int = 1, labels: int = 0, **sizes):
    """A random fp32 model: hidden 64, 4 layers, 4 heads of 16, 2 key-value heads. ``family``: a key of ``CONFIGS``.

    ``labels``: 0 of a language model, 1 of a reward model, more of a classifier.
    ``sizes`` override the config's (``hidden_size=256``); heads then are of ``hidden_size / num_attention_heads``.
    """
    fields = SHAPE | CONFIGS[family] | {"vocab_size": vocab} | sizes
    if family.startswith("qwen3"):  # its default head_dim is 128, whatever the sizes
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if labels:
            config = AutoConfig.for_model(**fields, num_labels=labels, pad_token_id=0)
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif name.endswith("mlp.gate.weight"):  # a router: which experts are the top ones must not be a near tie
                parameter.normal_(std=ROUTER_STD)
    return model.eval()


def build_tiny_hf(family: str, directory: Path, seed: int = 1, **sizes) -> Path:
    """Write a Hugging Face directory (config, safetensors, tokenizer, generation config) and return it."""
    tokenizer = build_tokenizer()
    model = build_model(family, len(tokenizer), seed, **sizes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def build_tiny_reward_model(family: str, directory: Path, seed: int = 8, labels: int = 1, tokenizer=None) -> Path:
    """A ``...ForSequenceClassification`` directory; its padding token is ``<|endoftext|>``, id 0. ``tokenizer``: another one."""
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    build_model(family, len(tokenizer), seed, labels).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
