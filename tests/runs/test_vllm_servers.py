"""``g2r train`` with ``rollout.vllm.mode servers``: two real vLLM servers (tools/vllm_server.sh), which are killed in the end.

Both start once; the tests build on each other, in their order. vLLM is not imported in this process. Leaves out servers on
GPUs, servers that are parallel themselves, and mixtures of experts (tests/parity/test_vllm.py: the workers are the same).
"""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from g2r_megatron.config.options import VLLMConfig
from g2r_megatron.errors import RunError
from g2r_megatron.model.safetensors_files import SafetensorsReader
from g2r_megatron.rollout.vllm.server import Server, ServerLost, WeightUpdate
from g2r_megatron.rollout.vllm.transfer import check_sum
from real_runs import PATIENCE, ROOT, TASK, log_of, quickstart_options, records, send, start, wait_for
from test_bad_input import assert_refused
from test_vllm import UPDATES, by_transformers, updated_engine
from test_vllm_training import in_another_process
from tiny_models import build_tiny_hf

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]
LONGEST = 256  # tokens


class RunningServer:
    """A server in a session of its own: all its processes can be signalled."""

    def __init__(self, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = ["tools/vllm_server.sh", str(TASK / "model"), "--port", str(self.port), "--dtype", "float32"]
        command += ["--max-model-len", str(LONGEST), "--kv-cache-memory-bytes", str(64 << 20)]
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        with open(log, "wb") as out:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # all have ended
            return

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    both = [RunningServer(tmp_path_factory.mktemp("servers") / f"{name}.log") for name in "ab"]
    try:
        for server in both:
            server.wait_until_ready()
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture(scope="module")
def options(tmp_path_factory, servers) -> list[str]:
    urls = ", ".join(f'"{server.url}"' for server in servers)
    return [
        *quickstart_options(tmp_path_factory.mktemp("data")),
        *("--rollout.engine", "vllm", "--rollout.vllm.mode", "servers", "--rollout.vllm.urls", f"[{urls}]"),
        *("--optimizer.lr", "1e-3", "--rollout.temperature", "0.8", "--eval.every", "0"),
    ]


def test_what_does_not_fit_is_refused(options, tmp_path):
    """Before anything is written: no server, another model, and options that the servers were not started for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    other = build_tiny_hf("qwen3", tmp_path / "other", head_dim=32)
    refused = [
        (["--rollout.vllm.urls", f'["{nobody}"]'], ["rollout.vllm.urls", f"no vLLM server answers at {nobody}"]),
        (["--policy.model", str(other)], ["another model", str(TASK / "model"), "vocab_size is 165 there"]),
        (["--policy.precision.dtype", "bf16"], ["dtype float32", "--dtype bfloat16"]),
        (
            ["--rollout.max_prompt_tokens", str(LONGEST)],
            [f"sequences of {LONGEST} tokens at most", "--max-model-len"],
        ),
        (["--rollout.top_p", "0.9", "--rollout.temperature", "1"], ["logprobs_mode", "--logprobs-mode raw_logprobs"]),
    ]
    commands = [["train", *options, *more, "--output_dir", str(tmp_path / "run")] for more, _ in refused]
    for result, (_, said) in zip(in_another_process(commands), refused, strict=True):
        assert_refused(result, *said)
    assert not (tmp_path / "run").exists()


def test_updates_that_do_not_arrive(servers):
    """A changed tensor is named by the worker; a trainer that ends in the middle of an update is noticed at once.

    The runs below show that such a server takes the next update.
    """
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = SafetensorsReader(TASK / "model").read(name, None, None)
    norm = "model.layers.1.post_attention_layernorm.weight"
    other = SafetensorsReader(TASK / "model").read(norm, None, None)
    server = Server(servers[0].url, timeout=60)
    for bucket, sent, said in (
        ([(name, tensor, check_sum(tensor) + 1)], True, f"{name} was changed on its way"),
        ([(norm, other, check_sum(other)), (name, tensor, check_sum(tensor))], False, "closed the connection"),
    ):
        with ThreadPoolExecutor() as pool:
            update = WeightUpdate(server, pool)
            with pytest.raises(RunError, match=said):
                update.send(bucket)
                if sent:
                    update.send([])
                update.close()
                update.finish()
            update.close()
    assert server.is_healthy() and not server.lost


def test_updated_servers_say_what_the_exported_weights_say(servers, worlds, tmp_path):
    """Greedy, after three visible updates from tensor parallel ranks, a broken update before them and a filled prefix cache."""
    export, vocab, urls = str(tmp_path / "export"), 165, [server.url for server in servers]
    vllm = VLLMConfig(mode="servers", urls=urls)
    results = worlds.on("tp2pp1sp", partial(updated_engine, vllm=vllm), str(TASK / "model"), export, vocab)
    worlds.close()
    expected = by_transformers(export, vocab)
    for result in results:
        assert result["greedy"] == expected
        assert result["sampled"] == results[0]["sampled"] != expected
        assert result["error"] < 1e-4
        assert result["version"] >= UPDATES


def test_a_server_that_hangs_is_lost_when_time_is_up(servers):
    server = Server(servers[1].url, timeout=1)
    servers[1].signal(signal.SIGSTOP)
    try:
        with pytest.raises(ServerLost, match="ReadTimeout"):
            server.post("/collective_rpc", {"method": "g2r_describe"})
    finally:
        servers[1].signal(signal.SIGCONT)


def test_training_until_the_last_server_is_killed(servers, options, tmp_path):
    """Two ranks and two servers. One is killed: it is named, and training goes on. Then the other: the run ends, naming both."""
    run = tmp_path / "run"
    process = start(run, [*options, "--steps", "1000", "--rollout.correction", "tis"], ranks=2)

    def steps() -> list[dict]:
        return records(run, "metrics.jsonl")[1:] if (run / "metrics.jsonl").exists() else []

    try:
        wait_for(lambda: len(steps()) >= 2, process, run)
        servers[1].kill()
        before = len(steps())
        wait_for(lambda: len(steps()) >= before + 3, process, run)
        assert f"vLLM server {servers[1].url} is lost" in log_of(run)
        servers[0].kill()
        assert process.wait(PATIENCE) == 1
    finally:
        send(run, signal.SIGKILL)
    assert all(later["step"] == earlier["step"] + 1 for earlier, later in pairwise(steps()))
    for record in steps():
        assert 0 < record["rollout/sync_error"] < 1e-4 and record["rollout/corrected_share"] == 0
    (line,) = [line for line in log_of(run).splitlines() if line.startswith("g2r: error: ")]
    assert "no vLLM server is left" in line and servers[0].url in line and servers[1].url in line
