"""Converted checkpoints hold the same bits: Hugging Face -> Megatron -> Hugging Face, and what training has saved.

For every family, tied and untied, a prime vocabulary, fp32, bf16 and fp16 files, experts stored one by one and together,
in one process and two; a converted checkpoint is what Megatron-Core itself saves and loads on any layout. A conversion
killed at any file operation leaves no directory that looks complete, and one that the disk refuses leaves nothing.
Leaves out bad input (test_convert_bad_input.py), speed and memory (benchmarks/convert.py).
"""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from convert_models import DIRECTORIES, FUSED, other_files, tensors_of, to_hf, to_megatron, write_directory
from distributed import CaseFailed, groups_of
from g2r_megatron.config.options import Layout, Precision
from g2r_megatron.convert.output_directory import check_free_space
from g2r_megatron.convert.tensor_table import Block, row_blocks, share
from g2r_megatron.errors import UserError
from scripts import imported
from test_checkpoint import checkpointer_of, hf_arrays, trainer_of, update

TOOLS = Path(__file__).parents[2] / "tools"


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
    """``converted(name)`` -> the Megatron checkpoint of ``source(name)``, made once by one process; read only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "megatron"
            assert worlds[1].run(to_megatron, str(source(name)), str(made[name])) == [None]
        return made[name]

    return get


def assert_same_directory(a: Path, b: Path) -> None:
    before, after = tensors_of(a), tensors_of(b)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert other_files(a) == other_files(b)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but the mark of a conversion that was killed after its last rename."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".g2r_conversion"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# In the ranks.


def parameters(layout: Layout, path: str) -> dict:
    """This rank's parameters after loading ``path`` in fp32, as bytes."""
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model

    model = build_model("policy", open_hf_model(path, "policy.model"), groups_of(layout), Precision(dtype="fp32"))
    return {name: parameter.detach().numpy().tobytes() for name, parameter in model.named_parameters()}


def save_as_megatron_does(path: str, output: str) -> None:
    from megatron.core import dist_checkpointing

    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.model.torch_dist import sharded_weights
    from g2r_megatron.policy.background_save import write_in_this_process

    groups = groups_of(Layout())
    model = build_model("policy", open_hf_model(path, "policy.model"), groups, Precision(dtype="fp32"))
    write_in_this_process()
    dist_checkpointing.save(sharded_weights(model.chunks, groups), output)


def train_and_save(layout: Layout, path: str, directory: str) -> dict:
    """One update, a checkpoint of it; the weights under Hugging Face names on rank 0."""
    trainer = trainer_of(layout, path)
    update(trainer)
    checkpointer_of(trainer, directory).save(1)
    return hf_arrays(trainer.model)


def in_small_pieces(source: str, output: str, direction: str) -> str | None:
    """Convert with blocks of a few rows, files of a few chunks and a cache of one: what large models come to."""
    from g2r_megatron.convert import chunks
    from g2r_megatron.convert import tensor_table as parameters

    sizes = parameters.BLOCK_BYTES, chunks.FILE_BYTES, chunks.CACHE_BYTES
    parameters.BLOCK_BYTES, chunks.FILE_BYTES, chunks.CACHE_BYTES = 3000, 40_000, 5000
    try:
        return {"to_megatron": to_megatron, "to_hf": to_hf}[direction](source, output)
    finally:
        parameters.BLOCK_BYTES, chunks.FILE_BYTES, chunks.CACHE_BYTES = sizes


def convert_until(source: str, output: str, direction: str, operation: int) -> int:
    """Convert, and kill this process as the given file operation in the output's folder begins. How many there were."""
    folder, count = str(Path(output).parent), 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and str(args[0]).startswith(folder):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    assert {"to_megatron": to_megatron, "to_hf": to_hf}[direction](source, output) is None
    return count


def convert_with_small_files(source: str, output: str, direction: str, limit: int) -> str | None:
    """Convert where no file may grow beyond ``limit`` bytes, as a full disk would stop it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return {"to_megatron": to_megatron, "to_hf": to_hf}[direction](source, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tool_here(tool: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and error output of a tool in this process, which leaves its world if nothing went wrong."""
    from g2r_megatron.cli import exit_code

    output, errors = io.StringIO(), io.StringIO()
    with imported(f"tools/{tool}") as module, redirect_stdout(output), redirect_stderr(errors):
        code = exit_code(lambda: module.main(list(arguments)))
    return code, output.getvalue(), errors.getvalue()


# The tests. Commands first: the worlds of the later ones keep the machine busy.


def run_tool(tool: str, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*launcher, str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


def test_the_tools_as_commands(worlds, source, tmp_path):
    """Both ways, the comparison and a refusal from the command line; progress in a pipe is plain lines."""
    hf, megatron, back = str(source("qwen2")), str(tmp_path / "megatron"), str(tmp_path / "back")
    first = run_tool("convert_hf_to_megatron.py", "--hf", hf, "--output", megatron)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("\n") == 1 and "GB/s" in first.stdout and "\r" not in first.stdout

    def tool(name: str, *arguments: str) -> tuple[int, str, str]:
        (ended,) = worlds[1].run(tool_here, name, *arguments)
        worlds.close()
        return ended

    assert tool("convert_megatron_to_hf.py", "--checkpoint", megatron, "--output", back)[0] == 0
    assert_same_directory(source("qwen2"), tmp_path / "back")
    code, printed, _ = tool("verify_checkpoint.py", megatron, back)
    assert code == 0 and "bitwise equal" in printed
    code, _, said = tool("convert_hf_to_megatron.py", "--hf", hf, "--output", megatron)
    assert code == 2 and said.startswith("g2r: error: --output") and said.count("\n") == 1


def test_a_tool_under_torchrun(worlds, source, tmp_path):
    """Two processes share the work; a refusal is printed once."""
    command = ("convert_hf_to_megatron.py", "--hf", str(source("qwen2")), "--output", str(tmp_path / "out"))
    first = run_tool(*command, processes=2)
    assert first.returncode == 0, first.stderr
    assert {p.name for p in (tmp_path / "out").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    again = worlds[2].run(tool_here, *command)
    assert [code for code, _, _ in again] == [2, 2]
    assert "".join(said for _, _, said in again).count("g2r: error: --output") == 1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", [*DIRECTORIES, *FUSED])
def test_round_trip_is_bitwise(worlds, source, tmp_path, name, processes):
    """Every tensor, config field, tokenizer and generation config come back as they were; no leftovers."""
    megatron, back = tmp_path / "megatron", tmp_path / "deep" / "back"
    world = worlds[processes]
    assert world.run(to_megatron, str(source(name)), str(megatron)) == [None] * processes
    assert world.run(to_hf, str(megatron), str(back)) == [None] * processes
    assert_same_directory(source(name), back)
    assert {p.name for p in tmp_path.iterdir()} == {"megatron", "deep"}
    assert other_files(megatron / "hf") == other_files(source(name))
    if processes == 2:
        assert {p.name for p in megatron.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


def test_a_language_model_of_a_larger_one_with_fp32_norms_and_a_query(worlds, source, tmp_path):
    """Mixed dtypes keep their bits where one parameter has one dtype, and their values where the wider one holds both.

    What comes back is the language model alone, under its own names, which transformers loads.
    """
    whole, megatron, back = tmp_path / "whole", tmp_path / "megatron", tmp_path / "back"
    shutil.copytree(source("mistral"), whole)
    text = json.loads((whole / "config.json").read_text())
    outer = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {"a": 1}}
    (whole / "config.json").write_text(json.dumps(outer | {"text_config": text}))
    wide = {n: t.float() if "norm" in n or n.endswith("q_proj.weight") else t for n, t in tensors_of(whole).items()}
    tower = {"vision_tower.norm.weight": torch.ones(3)}
    save_file({f"language_model.{n}": t for n, t in wide.items()} | tower, whole / "model.safetensors")
    assert worlds[1].run(to_megatron, str(whole), str(megatron)) == [None]
    assert worlds[1].run(to_hf, str(megatron), str(back)) == [None]
    after = tensors_of(back)
    assert after.keys() == wide.keys()
    for name, tensor in wide.items():
        kept = torch.float32 if name.split(".")[-2] in ("k_proj", "v_proj") else tensor.dtype
        assert after[name].dtype == kept and torch.equal(after[name], tensor.to(kept)), name
    config = AutoConfig.from_pretrained(back)
    assert (config.model_type, config.architectures) == ("mistral", ["MistralForCausalLM"])


@pytest.mark.parametrize("name", ["qwen2", "llama3", "mixtral_fused", "qwen3_moe_some_layers"])
def test_a_converted_checkpoint_is_what_megatron_saves(worlds, source, converted, tmp_path, name):
    """Same tensors, shapes and dtype in .metadata (the vocabulary without padding), same common.pt and metadata.json."""
    from g2r_megatron.convert.chunks import CheckpointReader

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    worlds[1].run(save_as_megatron_does, str(source(name)), str(theirs))
    tensors = [
        {
            key: (info.properties, [383, *info.size[1:]] if info.size[0] == 384 else list(info.size))
            for key, info in CheckpointReader(path).tensors.items()
        }
        for path in (theirs, converted(name))
    ]
    assert tensors[0] == tensors[1]
    for file in ("metadata.json", "common.pt"):
        assert (theirs / file).read_bytes() == (converted(name) / file).read_bytes()


LOADED = [(layout, name) for layout in ("tp2pp2sp", "tp4pp1", "pp2_uneven") for name in ("qwen2", "llama3")]
LOADED += [(layout, "mixtral") for layout in ("ep2", "tp2sp_ep2_etp2", "pp2_ep2")]
LOADED += [("tp2sp_ep2", "qwen3_moe_some_layers")]


@pytest.mark.parametrize(("layout", "name"), LOADED)
def test_a_converted_checkpoint_loads_on_any_layout(worlds, source, converted, layout, name):
    """Through Megatron-Core's own loading: every rank's parameters, padding too, as read from the safetensors files."""
    assert worlds.on(layout, parameters, str(converted(name))) == worlds.on(layout, parameters, str(source(name)))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("tp2pp2sp", "qwen2"),
        ("tp4pp1", "llama3"),
        ("tp1pp1dp2", "qwen2"),
        ("tp2_pp2_uneven", "llama3"),
        ("tp2sp_ep2_dp2", "mixtral_fused"),
        ("pp2_uneven_etp2", "mixtral"),
    ],
)
def test_a_training_checkpoint_becomes_a_hugging_face_directory(worlds, source, tmp_path, layout, name):
    """Trained weights, saved in shards with optimizer state beside them, equal those of the model in memory."""
    runs = tmp_path / "checkpoints"
    trained = worlds.on(layout, train_and_save, str(source(name)), str(runs))[0]
    assert worlds[2].run(in_small_pieces, str(runs / "step_00000001"), str(tmp_path / "out"), "to_hf") == [None, None]
    found = tensors_of(tmp_path / "out")
    assert trained.keys() == found.keys() == tensors_of(source(name)).keys()
    for key, value in trained.items():
        assert torch.equal(found[key], torch.from_numpy(value)), key
    assert other_files(tmp_path / "out") == other_files(source(name))


def test_a_checkpoint_without_config_takes_one_from_elsewhere(worlds, source, converted, tmp_path):
    """``--hf DIR``: the way out for checkpoints of older runs. config.json gets the dtype of the weights."""
    older = tmp_path / "older"
    older.mkdir()
    for file in converted("qwen2").iterdir():
        if file.is_file() and file.name != "g2r.json":
            (older / file.name).write_bytes(file.read_bytes())
    assert "config" in worlds[1].run(to_hf, str(older), str(tmp_path / "out"))[0]
    assert worlds[1].run(to_hf, str(older), str(tmp_path / "out"), str(source("qwen2"))) == [None]
    assert_same_directory(source("qwen2"), tmp_path / "out")
    config = source("qwen2").parent / "other"
    config.mkdir()
    for name, content in other_files(source("qwen2")).items():
        (config / name).write_bytes(content.replace(b'"float32"', b'"bfloat16"') if name == "config.json" else content)
    assert worlds[1].run(to_hf, str(older), str(tmp_path / "out2"), str(config)) == [None]
    assert json.loads((tmp_path / "out2" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("name", ["qwen2", "mixtral_fused"])
def test_large_tensors_are_copied_in_pieces(worlds, source, converted, tmp_path, name):
    """Tensors of many blocks, chunks that begin and end inside them, several files a process: still the same bits."""
    pieces = tmp_path / "pieces"
    assert worlds[2].run(in_small_pieces, str(source(name)), str(pieces), "to_megatron") == [None, None]
    assert len(list(pieces.glob("__1_*.distcp"))) > 3
    for start, direction in ((pieces, in_small_pieces), (pieces, to_hf), (converted(name), in_small_pieces)):
        output = tmp_path / f"{start.name}_{direction.__name__}"
        arguments = ["to_hf"] if direction is in_small_pieces else []
        assert worlds[2].run(direction, str(start), str(output), *arguments) == [None, None]
        assert_same_directory(source(name), output)
    assert worlds.on("tp2pp2sp", parameters, str(pieces)) == worlds.on("tp2pp2sp", parameters, str(source(name)))


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_killed_at_any_moment_leaves_nothing_that_looks_complete(worlds, source, converted, tmp_path, direction):
    """kill -9 before one of the file operations, spread over all, and the last ones: no NAME, or all of it.

    A second try replaces the leftover.
    """
    start = source("qwen2_untied") if direction == "to_megatron" else converted("qwen2_untied")

    def run(name: str, operation: int):
        (tmp_path / name).mkdir()
        return worlds[1].run(convert_until, str(start), str(tmp_path / name / "out"), direction, operation)

    operations = run("whole", 0)[0]
    whole = contents(tmp_path / "whole")
    for operation in sorted({*range(1, operations, max(1, operations // 6)), operations - 1, operations}):
        with pytest.raises(CaseFailed, match=r"died"):
            run(f"killed{operation}", operation)
        folder = tmp_path / f"killed{operation}"
        if not (folder / "out").exists():
            assert {p.name for p in folder.iterdir()} <= {"out.incomplete"}
            again = {"to_megatron": to_megatron, "to_hf": to_hf}[direction]
            assert worlds[1].run(again, str(start), str(folder / "out")) == [None]
        assert contents(folder) == whole


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_a_disk_that_refuses_is_one_clear_error(worlds, source, converted, tmp_path, direction, processes):
    """Files cannot grow: the same message on every process, and nothing is left."""
    start = source("qwen2") if direction == "to_megatron" else converted("qwen2")
    messages = worlds[processes].run(convert_with_small_files, str(start), str(tmp_path / "out"), direction, 150_000)
    assert all("File too large" in message and "\n" not in message for message in messages)
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_before_work(tmp_path):
    """A checkpoint that cannot fit is refused at once."""
    check_free_space(tmp_path / "out", 1000)
    with pytest.raises(UserError, match="do not fit"):
        check_free_space(tmp_path / "out", 10**18)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_row_is_shared_out_once(processes):
    """Shares are runs of neighbours of about equal bytes, down to more processes than blocks."""
    shapes = [((2_500_000, 8), torch.float32), ((1000,), torch.bfloat16), ((3, 5, 7), torch.float16)] * 2
    blocks = row_blocks(shapes)
    assert len(blocks) == 2 * (5 + 1 + 1)
    shares = [list(share(blocks, rank, processes)) for rank in range(processes)]
    assert [block for part in shares for block in part] == blocks
    sizes = [sum(block.nbytes for block in part) for part in shares]
    assert max(sizes) - min(sizes) <= 2 * max(block.nbytes for block in blocks)
    assert list(share([Block(0, 0, 1, 4)], 1, 2)) == [Block(0, 0, 1, 4)]
