"""The comparison finds every planted difference between two checkpoints, says where, and finds no other.

Hugging Face directories and Megatron checkpoints against each other, fused experts against separate ones, one process
and two; logits of equal and of slightly different weights. Leaves out large tensors and speed (benchmarks/convert.py).
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convert_models import copy_of, tensors_of, to_megatron, write_directory

DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """``source(name)`` -> a Hugging Face directory of convert_models, written once; read only."""
    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            written[name] = write_directory(name, tmp_path_factory.mktemp(name) / "hf")
        return written[name]

    return get


@pytest.fixture(scope="module")
def converted(worlds, source, tmp_path_factory):
    """``converted(name)`` -> the Megatron checkpoint of ``source(name)``."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "megatron"
            assert worlds[1].run(to_megatron, str(source(name)), str(made[name])) == [None]
        return made[name]

    return get


def changed(directory: Path, to: Path, change) -> Path:
    """A copy in one file, with ``change`` made to its dictionary of tensors."""
    copy_of(directory, to)
    tensors = tensors_of(to)
    for file in to.glob("model*.safetensors*"):
        file.unlink()
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


# In the ranks.


def compared(a: str, b: str) -> tuple:
    """([(name, digest of A, of B, problem)], differences of the configs, notes)."""
    from g2r_megatron.convert.verify import compare_configs, compare_tensors, open_sides

    sides = open_sides((a, b))
    reports = compare_tensors(*sides)
    return [(r.name, r.digest_a, r.digest_b, r.problem) for r in reports], *compare_configs(*sides)


def verified(a: str, b: str, logits: bool, text: str | None = None) -> tuple[int | str, str]:
    """(exit code or error, what was printed)."""
    import contextlib
    import io

    from g2r_megatron.convert.comparison import verify
    from g2r_megatron.errors import UserError

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = verify((a, b), False, logits, text)
        except UserError as error:
            code = str(error)
    return code, out.getvalue()


def logit_report(a: str, b: str) -> tuple:
    from g2r_megatron.convert.logits import compare_logits
    from g2r_megatron.convert.verify import open_sides

    left, right = open_sides((a, b))
    report = compare_logits(left.hf, right.hf, None)
    return report.tokens, report.absolute, report.relative, report.agreement, report.equal


# The tests.


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["qwen2", "qwen2_untied", "llama3_half", "mixtral", "qwen3_moe_fused"])
def test_a_checkpoint_equals_its_source(worlds, source, converted, name, processes):
    """Every tensor once, under its Hugging Face name, with the sha256 of its bytes."""
    for results in worlds[processes].run(compared, str(source(name)), str(converted(name))):
        reports, differences, notes = results
        tensors = tensors_of(source(name))
        assert [report[0] for report in reports] == sorted(tensors)
        for key, digest_a, digest_b, problem in reports:
            expected = hashlib.sha256(tensors[key].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            assert (digest_a, digest_b, problem) == (expected, expected, None)
        assert differences == notes == []


def pairs_of_fused(source, converted) -> list[tuple[Path, Path]]:
    fused, separate = source("qwen3_moe_fused"), source("qwen3_moe")
    return [(fused, separate), (converted("qwen3_moe_fused"), separate), (fused, converted("qwen3_moe"))]


def test_fused_experts_equal_separate_ones(worlds, source, converted):
    """In files and in checkpoints; compared one expert at a time."""
    for a, b in pairs_of_fused(source, converted):
        reports, differences, _ = worlds[2].run(compared, str(a), str(b))[0]
        assert [report[0] for report in reports] == sorted(tensors_of(source("qwen3_moe")))
        assert differences == [] and all(report[3] is None for report in reports)


def test_a_changed_expert_is_found_among_fused_ones(worlds, source, tmp_path):
    """One value of one expert in a fused tensor: named as that expert's."""

    def change(tensors):
        tensors["model.layers.2.mlp.experts.gate_up_proj"][5, 50, 7] = 3.0  # [E, 2 x 48, 64]: row 2 of up

    bad = changed(source("qwen3_moe_fused"), tmp_path / "bad", change)
    reports, _, _ = worlds[1].run(compared, str(bad), str(source("qwen3_moe")))[0]
    different = {name: problem for name, _, _, problem in reports if problem}
    assert list(different) == ["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert "1 of 3072 values differ, most at row 2, column 7: 3 in A" in different.popitem()[1]


def test_differences_are_named_and_placed(worlds, source, converted, tmp_path):
    """Missing, of another shape, dtype or value; how many values, and where they differ most; NaN and -0 too."""

    def change(tensors):
        tensors[DOWN][3, 5] += 0.25
        tensors[DOWN][60, 95] -= 0.5
        tensors[NORM][0] = float("nan")
        tensors["model.layers.0.self_attn.q_proj.bias"] = tensors["model.layers.0.self_attn.q_proj.bias"].bfloat16()
        tensors["model.layers.0.self_attn.k_proj.bias"] = (
            tensors["model.layers.0.self_attn.k_proj.bias"].double().float()
        )
        tensors["model.layers.0.self_attn.v_proj.bias"][2] = 0.0
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"][:90].clone()
        del tensors["model.layers.3.input_layernorm.weight"]
        tensors["more"] = torch.ones(2)

    good = changed(
        source("qwen2"), tmp_path / "good", lambda t: t["model.layers.0.self_attn.v_proj.bias"][2].zero_().neg_()
    )
    bad = changed(good, tmp_path / "bad", change)
    value = tensors_of(good)[DOWN][60, 95].item()
    reports, _, _ = worlds[2].run(compared, str(good), str(bad))[0]
    different = {name: problem for name, _, _, problem in reports if problem}
    assert different.keys() == {
        DOWN,
        NORM,
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.3.input_layernorm.weight",
        "more",
    }
    assert different[DOWN].startswith(f"2 of 6144 values differ, most at row 60, column 95: {value:.9g} in A, ")
    assert different[DOWN].endswith("(difference 0.5)")
    assert "1 of 64 values differ, most at element 0" in different[NORM] and "nan in B" in different[NORM]
    assert different["model.layers.0.self_attn.q_proj.bias"].startswith("dtype float32 in A, bfloat16 in B; 6")
    assert "at element 2: -0 in A, 0 in B (difference 0)" in different["model.layers.0.self_attn.v_proj.bias"]
    assert different["model.layers.2.mlp.up_proj.weight"] == "shape [96, 64] in A, [90, 64] in B"
    assert different["model.layers.3.input_layernorm.weight"] == "only in A"
    assert different["more"] == "only in B"
    digests = {name: (a, b) for name, a, b, _ in reports}
    assert all((a != b) == (name in different) for name, (a, b) in digests.items())


def test_a_repeated_tied_output_layer_is_compared_with_the_embedding(worlds, source, tmp_path):
    """Equal to the embedding: no difference. Another one: found."""
    same = changed(
        source("qwen2"),
        tmp_path / "same",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    other = changed(same, tmp_path / "other", lambda t: t["lm_head.weight"][7].mul_(2.0))
    for a, b, found in ((source("qwen2"), same, []), (other, source("qwen2"), ["lm_head.weight"])):
        reports, _, _ = worlds[1].run(compared, str(a), str(b))[0]
        assert [name for name, _, _, problem in reports if problem] == found
        assert "lm_head.weight" in {report[0] for report in reports}


def test_configs_are_compared(worlds, source, tmp_path):
    """A field of another value makes a difference; the version that wrote it, and how dtype is spelled, do not."""
    other = copy_of(source("qwen2"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config |= {"transformers_version": "4.40.0", "rms_norm_eps": 1e-5, "torch_dtype": config.pop("dtype")}
    (other / "config.json").write_text(json.dumps(config))
    _, differences, notes = worlds[1].run(compared, str(source("qwen2")), str(other))[0]
    assert differences == ["config.json rms_norm_eps: 1e-06 in A, 1e-05 in B"]
    assert len(notes) == 1 and "transformers_version" in notes[0]
    code, printed = worlds[1].run(verified, str(source("qwen2")), str(other), False)[0]
    assert code == 1 and "rms_norm_eps" in printed and "note: config.json transformers_version" in printed


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_logits(worlds, source, converted, tmp_path, name):
    """Equal weights give equal logits, from either kind of checkpoint; slightly different ones do not pass."""
    tokens, absolute, relative, agreement, equal = worlds[1].run(logit_report, str(source(name)), str(converted(name)))[
        0
    ]
    assert tokens > 200 and (absolute, relative, agreement, equal) == (0.0, 0.0, 1.0, True)
    bad = changed(source(name), tmp_path / "bad", lambda t: t["model.embed_tokens.weight"][40:200].mul_(1.01))
    _, absolute, relative, agreement, equal = worlds[1].run(logit_report, str(source(name)), str(bad))[0]
    assert absolute > 0.0 and relative > 1e-5 and not equal and 0.0 < agreement <= 1.0


def test_exit_codes_and_summary(worlds, source, converted, tmp_path):
    """0 and the hash of the whole; 1 and what differs; a checkpoint that cannot be read, or logits under torchrun: 2."""
    code, printed = worlds[1].run(verified, str(source("qwen2")), str(converted("qwen2")), True)[0]
    assert code == 0 and "all 50 tensors are bitwise equal (sha256 " in printed and "top-1 equal at 100.0%" in printed
    bad = changed(source("qwen2"), tmp_path / "bad", lambda t: t[NORM].mul_(1.5))
    code, printed = worlds[1].run(verified, str(converted("qwen2")), str(bad), False)[0]
    assert code == 1 and f"\n{NORM}: 64 of 64 values differ" in printed and "1 of 50 tensors differ" in printed
    code, printed = worlds[1].run(verified, str(source("qwen2")), str(source("llama3")), False)[0]
    assert code == 1 and "config.json model_type" in printed
    (bad / "model.safetensors").write_bytes(b"no tensors")
    for (code, _), kind in (
        (worlds[1].run(verified, str(source("qwen2")), str(bad), False)[0], "model.safetensors"),
        (worlds[1].run(verified, str(tmp_path / "nowhere"), str(bad), False)[0], "nowhere"),
        (worlds[1].run(verified, str(source("qwen2")), str(source("qwen2")), True, "")[0], "--text"),
        (worlds[2].run(verified, str(source("qwen2")), str(source("qwen2")), True)[1], "--logits"),
    ):
        assert kind in code and "\n" not in code
