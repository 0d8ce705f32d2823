"""Tiny random Hugging Face models with their tokenizer, built in a second: what the tests load instead of real ones.

Every weight is random, biases and norms too, so that one which is lost or transposed on the way shows in the numbers.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("qwen2", "qwen3", "llama3")

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


def build_model(family: str, vocab: int, seed: int = 1, **sizes):
    """A random fp32 model: hidden 64, 4 layers, 4 heads of 16, 2 key-value heads. ``family``: one of ``FAMILIES``.

    ``sizes`` override the config's (``hidden_size=256``); heads then are of ``hidden_size / num_attention_heads``.
    """
    shape = (
        dict(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.1,
            dtype="float32",
        )
        | sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "qwen2":  # QKV bias, tied embeddings
            model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
        elif family == "qwen3":  # q/k norm
            head_dim = shape["hidden_size"] // shape["num_attention_heads"]
            model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=head_dim, tie_word_embeddings=False))
        elif family == "llama3":  # llama3 rope scaling
            model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False))
        else:
            raise ValueError(f"unknown family {family!r}")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def build_tiny_hf(family: str, directory: Path, seed: int = 1, **sizes) -> Path:
    """Write a Hugging Face directory (config, safetensors, tokenizer, generation config) and return it."""
    tokenizer = build_tokenizer()
    model = build_model(family, len(tokenizer), seed, **sizes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
