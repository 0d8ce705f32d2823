"""Every field of 22 published forms of config.json, changed: logits equal transformers', or it is refused by name.

A changed field is set where it was not, toggled, raised by one, emptied or left out. transformers' model of the changed
config, with weights that depend on their names and shapes alone, is the reference, on tiny sizes, to 1e-5 of the norm.
Leaves out sizes that are left out (transformers' defaults are of real models) and what training would change.
"""

import copy
import json
import zlib
from functools import cache
from pathlib import Path

import pytest
import torch

from config_forms import published_forms, shrunken
from g2r_megatron.config.options import Layout, Precision
from g2r_megatron.errors import UserError

TOKENS = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(2))  # past the original 16 positions
# left out, they would have the size of a real model
SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "head_dim", "moe_intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts"),
}
# transformers stops at spellings of these, which nothing here reads
SPELLINGS = {"torch_dtype", "dtype", "use_cache", "initializer_range"}
FORMS = published_forms()


def changes(fields: dict) -> list[tuple[str, dict]]:
    """(name of the field, changed config) of every change."""
    if "text_config" in fields:
        inner = [(name, fields | {"text_config": text}) for name, text in changes(fields["text_config"])]
        outer = {k: v for k, v in fields.items() if k not in ("text_config", "model_type")}
        return inner + [(name, fields | changed) for name, changed in changes(outer)]
    made = []
    for name, value in fields.items():
        for other in other_values(name, value):
            made.append((name, fields | {name: other}))
        if name not in SIZES:
            made.append((name, {k: v for k, v in fields.items() if k != name}))
        if isinstance(value, dict) and name.startswith("rope"):
            for key, inner in value.items():
                made += [(name, fields | {name: value | {key: other}}) for other in other_values(key, inner)]
                made.append((name, fields | {name: {k: v for k, v in value.items() if k != key}}))
    return made


def other_values(name: str, value) -> list:
    if value is None:
        return [4] if name in ("sliding_window", "head_dim") else [{"rope_type": "longrope", "factor": 2.0}, True]
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, 0]
    if isinstance(value, float):
        return [value * 2 or 0.5, str(value)]
    return {str: ["other", None], list: [[], None], dict: [{}, None]}[type(value)]


# In a rank.


def outcomes(directory: str, form: str) -> list[tuple[str, str, float]]:
    """(field, "" or the refusal, relative error of the logits if it loads) of every change of a form."""
    ours: dict = {}
    found = []
    for field, fields in changes(shrunken(FORMS[form])):
        (Path(directory) / "config.json").write_text(json.dumps(fields))
        try:
            found.append((field, "", relative_error(Path(directory), field, fields, ours)))
        except UserError as error:
            found.append((field, str(error), 0.0))
    return found


def relative_error(directory: Path, field: str, fields: dict, ours: dict) -> float:
    from g2r_megatron.model.hf import open_hf_model

    hf = open_hf_model(str(directory), "policy.model")
    expected, weights = reference(fields if field not in SPELLINGS else {k: v for k, v in fields.items() if k != field})
    table, factor = hf.rope_table()
    settings = hf.config.rms_norm_eps, getattr(hf.config, "norm_topk_prob", None), str(hf.sliding_window)
    key = hf.geometry, hf.architecture, tuple(table.tolist()), factor, settings
    if key not in ours:  # nothing else reaches our model
        ours[key] = our_logits(directory, hf, weights)
    return ((ours[key] - expected).norm() / expected.norm()).item()


def reference(fields: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' logits [T, vocab] of the language model that ``fields`` describe, and its weights."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = copy.deepcopy(fields.get("text_config", fields))
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, tuple(parameter.shape)))
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        return model(TOKENS).logits[0], weights


@cache
def random_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 0.2 * noise if len(shape) > 1 else 1 + 0.2 * noise


def our_logits(directory: Path, hf, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    from safetensors.torch import save_file

    from distributed import groups_of
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model

    save_file(weights, directory / "model.safetensors")
    hf = open_hf_model(str(directory), "policy.model")  # again: it looks how experts are stored
    model = build_model("policy", hf, groups_of(Layout()), Precision(dtype="fp32"))
    model.train(False)
    with torch.no_grad():
        return model.modules[0](TOKENS, None, None)[0][:, : hf.geometry.vocab].float()


# The test.


def test_there_are_twenty_forms():
    assert len(FORMS) >= 20


@pytest.mark.parametrize("form", FORMS)
def test_every_field_is_heeded_or_refused(worlds, tmp_path, form):
    [found] = worlds[1].run(outcomes, str(tmp_path), form)
    loaded = [error for _, refusal, error in found if not refusal]
    print({"changes": len(found), "loaded": len(loaded), "worst": f"{max(loaded):.1e}"})
    wrong = [(field, error) for field, refusal, error in found if not refusal and not error <= 1e-5]
    assert not wrong
    assert not [(field, refusal) for field, refusal, _ in found if refusal and field not in refusal]
    assert any(refusal for _, refusal, _ in found) and len(loaded) > len(found) / 4
