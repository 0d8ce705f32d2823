"""What the examples' make_model.py have in common: word tokenizers, small Qwen3 networks, the loss of a writer. Not a program."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
ROLES = ["user", "assistant", "system"]
IGNORED = -100  # label of positions without a loss


def make_tokenizer(directory: Path, marks: Sequence[str], words: Sequence[str]) -> None:
    """A word-level tokenizer: a BPE whose vocabulary holds whole words (with their space) and that merges nothing.

    ``marks`` stand without a space. An unknown word becomes one ``<unk>`` a character, so no unknown word looks like a single
    token.
    """
    space = "Ġ"  # how byte-level pre-tokenization writes the space before a word
    plain = [*marks, space, "Ċ", *ROLES]  # a role also stands at the start of a line, without a space
    tokens = [PAD, EOS, UNK, *plain, *(space + word for word in words)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=UNK, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(directory)


def make_network(tokenizer, hidden: int, positions: int) -> Qwen3ForCausalLM:
    """The untrained network, fp32. A wide initialisation: at this width 0.02 learns far too slowly."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
        dtype="float32",
    )
    network = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(network.model.embed_tokens.weight, std=0.3)
    return network


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """[b, s] int64."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)


def next_token_loss(network, rows: list) -> torch.Tensor:
    """Mean next-token cross-entropy where there are labels (right padding: a causal model needs no mask)."""
    ids, labels = (padded(list(column), v) for column, v in zip(zip(*rows), (0, IGNORED)))
    hidden = network.model(input_ids=ids).last_hidden_state[:, :-1]
    asked = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(network.lm_head(hidden[asked]), labels[:, 1:][asked])


def save(network, tokenizer, directory: Path) -> None:
    """Beside the tokenizer, with generation options that end at the end token."""
    network.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    network.save_pretrained(directory)
