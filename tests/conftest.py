"""Fixtures that several test files share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the models are tiny and the ranks share the cores


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory) -> Callable[[str], Path]:
    """``tiny_hf("qwen2" | "qwen3" | "llama3")`` -> a tiny random Hugging Face directory, built once; read only."""
    from tiny_models import build_tiny_hf

    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = build_tiny_hf(family, tmp_path_factory.mktemp(f"tiny_{family}"))
        return built[family]

    return get


@pytest.fixture(scope="module")
def worlds():
    """``worlds[4].run(function, *args)`` -> what each of 4 ranks returned (distributed.py); one set a module."""
    from distributed import Worlds

    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process runs a whole file, whose tests share worlds and runs, and one all that share the Slurm cluster."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slurm" if item.get_closest_marker("slurm") else item.path.stem))
