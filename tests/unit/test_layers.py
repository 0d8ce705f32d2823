"""Which part of the package may import which, read from the source. The table below is the package's map.

Leaves out imports by name at run time (importlib), and what a module does with what it is given.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "g2r_megatron"

# From the bottom to the top. A part (a folder, or a file beside the folders) may import the parts named in its row, all
# of them from rows above its own: so there are no circles and no imports upwards.
MAP = {
    # part: (what it is, what it may import)
    "errors": ("exceptions that end a command with one line", ""),
    "device": ("which device there is, its memory and clocks", ""),
    "client": ("the judge service's client: needs none of the rest", ""),
    "config": ("options, their parsing and cross-checks", "errors"),
    "data": ("rows, tokenizers, token spans", "errors"),
    "parallel": ("process groups, sides, preemption, Megatron-Core on CPU", "config device errors"),
    "records": ("what a run writes: metrics, heartbeat, failures", "config device errors"),
    "credit": ("from verdicts and gradients to advantages, without a model", "config data errors"),
    "report": ("tables, pages and figures made from records", "config credit errors records"),
    "model": ("Hugging Face and Megatron-Core models, weights, layers", "config data device errors parallel"),
    "rollout": ("sampling responses", "config data device errors model parallel records"),
    "policy": ("the trained model: losses, trainer, checkpoints", "config credit data device errors model parallel"),
    "judge": (
        "the frozen model: prompts, packing, verdicts, gradients",
        "config credit data device errors model parallel records",
    ),
    "convert": ("checkpoints from one format to another", "config device errors model parallel records"),
    "serve": (
        "judging as a service",
        "client config credit data device errors judge model parallel records",
    ),
    "adapters": ("glue for other training frameworks: light, no model of ours", "client credit serve"),
    "verify": ("whether a final answer is right", "config data errors"),
    "workers": (
        "the models and inputs of a run, built from its config",
        "config credit data errors judge model parallel policy records rollout verify",
    ),
    "experience": (
        "a step's batch on its way from prompts to advantages",
        "config credit data errors judge policy rollout workers",
    ),
    "alarms": (
        "when training against a judge goes wrong",
        "config credit data errors experience judge policy workers",
    ),
    "runs_on": ("what a run really runs on: devices, layers, optimizer", "config device errors model records"),
    "run": (
        "what a run shows, saves, and checks of itself",
        "alarms config credit errors experience policy records rollout runs_on workers",
    ),
    "eval": (
        "scores of a model on held-out rows",
        "config credit data device errors experience judge model parallel policy records report rollout run verify workers",
    ),
    "probe": (
        "is a judge's credit true",
        "config credit data errors eval judge model parallel records report rollout workers",
    ),
    "plan": ("memory and time of a job before it runs, doctor", "config data device errors judge model parallel workers"),
    "train": (
        "the loop and one step",
        "alarms config credit data device errors eval experience judge parallel policy records rollout run workers",
    ),
    "launch": (
        "what happens before and after the loop",
        "config credit data device errors experience judge parallel policy records rollout run train workers",
    ),
    "cli": (
        "the command line",
        "adapters config convert device errors eval judge launch parallel plan probe records report serve train",
    ),
}  # fmt: skip
# Known imports against the map, to be removed: (file, module imported)
EXCEPTIONS: set[tuple[str, str]] = set()

CUDA_ASKED_IN = {"device.py", "parallel/cpu.py"}
HF_NAMES = (
    "model.layers.",
    "self_attn",
    "embed_tokens",
    "lm_head",
    "input_layernorm",
    "mlp.gate",
    "q_proj",
    "down_proj",
)


@cache
def sources() -> dict[str, ast.Module]:
    """File (relative to the package) -> its syntax tree."""
    return {str(f.relative_to(PACKAGE)): ast.parse(f.read_text(), str(f)) for f in sorted(PACKAGE.rglob("*.py"))}


def part_of(file: str) -> str:
    """The folder of a file, or the name of one beside the folders."""
    return file.split("/")[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports of the package in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports() -> Iterator[tuple[str, str]]:
    """(file, what it imports from another part of the package, e.g. ``judge.types``)."""
    for file, tree in sources().items():
        for name in imported(tree):
            package, _, rest = name.partition(".")
            if package == PACKAGE.name and part_of(rest.replace(".", "/")) != part_of(file):
                yield file, ".".join(rest.split(".")[:2])


def excepted(file: str, module: str) -> bool:
    return (file, module) in EXCEPTIONS


def test_the_map_is_whole_and_has_no_circle():
    """Every part has a row; a row names parts of rows above it alone."""
    parts = {part_of(file) for file in sources()} - {"__init__"}
    assert parts <= MAP.keys(), (
        f"{sorted(parts - MAP.keys())}: not in the map of test_layers.py. Put the file into the folder whose description "
        "it fits, or give a new folder its row: below all that will use it, above all that it uses"
    )
    above: set[str] = set()
    for part, (_, allowed) in MAP.items():
        assert set(allowed.split()) <= above, f"{part}: {sorted(set(allowed.split()) - above)} must stand above it"
        above.add(part)


def test_imports_follow_the_map():
    """No import upwards, none from the side that the map does not name."""
    order = list(MAP)
    wrong = []
    for file, module in own_imports():
        part, other = part_of(file), part_of(module.replace(".", "/"))
        if other in MAP[part][1].split() or excepted(file, module):
            continue
        upwards = order.index(other) > order.index(part)
        wrong.append(
            f"{file} imports {module}: {part}/ ({MAP[part][0]}) may import {MAP[part][1] or 'nothing'}. "
            + (
                f"{other} is above it: move what both need down to a part that both may import, or pass it as an argument"
                if upwards
                else f"if {part} does need {other}/ ({MAP[other][0]}), add it to the row of {part} in test_layers.py"
            )
        )
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_still_needed():
    stale = EXCEPTIONS - set(own_imports())
    assert not stale, f"no longer imported: remove from EXCEPTIONS in test_layers.py: {stale}"


def test_credit_needs_no_model_and_no_other_rank():
    """credit/ computes on tensors that it is given: in one process, and in frameworks that have models of their own."""
    wrong = []
    for file, tree in sources().items():
        if part_of(file) == "credit":
            used = {*imported(tree), *(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))}
            wrong += [
                f"{file} uses {name}: what asks other ranks or a model belongs into judge/ or policy/, which call credit/"
                for name in sorted(used)
                if name.startswith(("torch.distributed", "megatron", "transformers", "dist."))
            ]
    assert not wrong, "\n".join(wrong)


def test_one_place_asks_whether_there_is_a_gpu():
    wrong = [
        f"{file}:{node.lineno} asks for CUDA: use device.py (on_cpu, local_device, ...), or add what is missing there"
        for file, tree in sources().items()
        if file not in CUDA_ASKED_IN
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "is_available" and "cuda" in ast.unparse(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_model_knows_the_names_of_hugging_face_parameters():
    """Found by words that are in these names, in strings that are not docstrings."""
    wrong = [
        f"{file}:{node.lineno} has {node.value!r}: names of Hugging Face parameters belong into model/families.py"
        for file, tree in sources().items()
        if part_of(file) != "model"
        for node in strings(tree)
        if any(name in node.value for name in HF_NAMES)
    ]
    assert not wrong, "\n".join(wrong)


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """The string constants, without those that are statements (docstrings)."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield node


@pytest.mark.parametrize("source", ["import torch.distributed as dist", "from torch import distributed"])
def test_both_ways_to_import_are_seen(source):
    """The reader of imports gives the same name for both."""
    assert list(imported(ast.parse(source))) == ["torch.distributed"]
