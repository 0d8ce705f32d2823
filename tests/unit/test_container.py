"""tools/container: its recipes agree with install_gpu.sh and with each other, and the lines for them in slurm/env.sh work.

The installation is a dry run in what looks like the image. Leaves out building an image, which takes its base and nvcc.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from test_install_gpu import SCRIPT, image_torch
from test_install_gpu import install as install  # a fixture

ROOT = Path(__file__).parents[2]
DOCKERFILE, DEFINITION = (ROOT / "tools" / "container" / name for name in ("Dockerfile", "g2r.def"))
ENV = ROOT / "slurm" / "env.sh"
RECIPES = pytest.mark.parametrize("recipe", [DOCKERFILE, DEFINITION], ids=lambda path: path.name)


def arguments(recipe: Path) -> dict[str, str]:
    """Build arguments and their defaults."""
    found = re.findall(r"^(?:ARG +| {4})(\w+)=(\S*)$", recipe.read_text(), re.M)
    return {name: value.strip('"') for name, value in found}


def shell(recipe: Path) -> str:
    """What the recipe has the shell do, with its arguments' defaults."""
    text, given = recipe.read_text(), arguments(recipe)
    if recipe == DEFINITION:
        post = text.partition("%post\n")[2].partition("\n%")[0]
        return re.sub(r"\{\{ (\w+) \}\}", lambda match: given[match[1]], post)
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^RUN (.*)$", joined, re.M)
    given |= dict(re.findall(r"^ENV (\w+)=(\S+)$", joined, re.M))
    return "\n".join(re.sub(r"\$(\w+)", lambda match: given.get(match[1], match[0]), line) for line in lines)


@RECIPES
def test_the_image_has_the_pinned_torch_and_cuda(recipe):
    (torch,), (cuda,) = (re.findall(rf"^{name}=(.*)$", SCRIPT.read_text(), re.M) for name in ("TORCH", "TORCH_CUDA"))
    image = arguments(recipe)["IMAGE" if recipe == DOCKERFILE else "image"]
    assert image == f"pytorch/pytorch:{torch}-cuda{cuda}-cudnn9-devel"


@RECIPES
def test_what_is_copied_exists_and_is_enough_to_install(recipe):
    """pip reads what pyproject.toml names; gpu_check.sh needs benchmarks and tests."""
    if recipe == DOCKERFILE:
        words = [line.split() for line in re.findall(r"^COPY (.*)$", recipe.read_text(), re.M)]
        sources = {source for line in words for source in line[:-1]}
    else:
        files = recipe.read_text().partition("%files\n")[2].partition("\n%")[0]
        sources = {line.split()[0] for line in files.strip().splitlines()}
    assert all((ROOT / source).exists() for source in sources)
    assert {"pyproject.toml", "README.md", "LICENSE", "g2r_megatron", "tools", "benchmarks", "tests"} <= sources


@RECIPES
def test_its_shell_lines_parse(recipe):
    subprocess.run(["sh", "-n"], input=shell(recipe), text=True, check=True)


def test_both_recipes_do_the_same():
    """The same packages of the system, the same call of the installation."""
    for pattern in (r"apt-get install (.*?)(?: &&.*)?$", r"install_gpu\.sh (.*)$"):
        found = [re.findall(pattern, re.sub(r" +", " ", shell(recipe)), re.M) for recipe in (DOCKERFILE, DEFINITION)]
        assert len(found[0]) == 1 and [shlex.split(one) for one in found[0]] == [shlex.split(one) for one in found[1]]


@RECIPES
def test_the_installation_as_the_recipe_calls_it(recipe, install, tmp_path):
    """In the image: its torch is there, nvcc is of its CUDA, and there is no driver."""
    call = shlex.split(re.findall(r"install_gpu\.sh (.*)$", shell(recipe), re.M)[0])
    options = [word for i, word in enumerate(call) if word != "--python" and call[i - 1] != "--python"]
    torch, cuda = re.fullmatch(r".*:([\d.]+)-cuda([\d.]+)-.*", next(iter(arguments(recipe).values()))).groups()
    image_torch(tmp_path, f"{torch}+cu{cuda.replace('.', '')}", cuda)
    done = install("--dry-run", *options, nvcc=cuda, driver=None)
    assert done.returncode == 0 and "would stop" not in done.stdout and "warning" not in done.stdout
    assert f"# torch {torch} is there" in done.stdout and "transformer-engine" in done.stdout


def written(name: str) -> str:
    """The line of env.sh that sets ``name`` for a container, without the comment's sign."""
    (line,) = re.findall(rf"^# ({name}=\(.*\))$", ENV.read_text(), re.M)
    return line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("G2R_SRUN", ["--container-image=/images/g2r.sqsh", "--container-mounts=/my code,/scratch",
                      "--container-workdir=/my code", "python"]),
        ("G2R_EXEC", ["apptainer", "exec", "--nv", "--bind", "/my code,/scratch", "--pwd", "/my code",
                      "/images/g2r.sif", "python"]),
    ],
)  # fmt: skip
def test_the_lines_of_env_sh(tmp_path, name, words):
    """Uncommented, job.sh's ``once`` starts its command in the container, also where paths have spaces."""
    once = re.findall(r"^once\(\) .*$", (ROOT / "slurm" / "job.sh").read_text(), re.M)[0]
    lines = ["G2R_HOME='/my code'", f"source {ENV}", written(name), "srun() { printf '%s\\n' \"$@\"; }", once]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([*lines, "once python"])],
        capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.splitlines()[3:] == words
