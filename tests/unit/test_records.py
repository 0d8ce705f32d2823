"""Unit tests of the records of a run (metrics.jsonl, samples.jsonl, TensorBoard) and of its progress output."""

import importlib.util
import json
import os
import pty
import select
import socket
import sys

import pytest
import torch

from g2r_megatron.config.checks import check_packages
from g2r_megatron.config.options import LogConfig
from g2r_megatron.config.trackers import check_wandb_login, wandb_host, wandb_mode
from g2r_megatron.errors import UserError, warn
from g2r_megatron.records.metrics_log import MetricsLog, read_metrics, read_samples
from g2r_megatron.records.progress_bar import Progress, format_seconds
from g2r_megatron.records.wandb_run import reachable

PLAIN = LogConfig(tensorboard=False)


def record_run(directory, steps, log=None):
    """Write ``steps`` into ``directory`` as a training run does, with one sample a step."""
    log = log or MetricsLog(directory, PLAIN, {})
    for step in steps:
        log.log(step, {"reward/mean": step / 7, "loss/kl": 0.1 * step})
        log.sample({"step": step, "response": f"text {step}"})
    return log


def test_lines_are_json_with_step_first_and_null_for_values_that_are_not_finite(tmp_path):
    """A line is strict JSON, step first, NaN and infinity as null, tensors as numbers. Leaves out W&B."""
    log = MetricsLog(tmp_path, PLAIN, {})
    log.log(3, {"a": float("nan"), "b": float("inf"), "c": torch.tensor(0.5), "d": 2})
    log.sample({"step": 3, "items": [{"alpha": [0.5, float("nan")]}]})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 3, "a": null, "b": null, "c": 0.5, "d": 2.0}\n'
    assert read_metrics(tmp_path) == [{"step": 3, "a": None, "b": None, "c": 0.5, "d": 2.0}]
    assert read_samples(tmp_path) == [{"step": 3, "items": [{"alpha": [0.5, None]}]}]


def test_interrupted_and_resumed_files_equal_uninterrupted_ones(tmp_path):
    """Truncating at the checkpoint's step and going on gives the same bytes, a torn last line included."""
    record_run(tmp_path / "whole", range(8))
    record_run(tmp_path / "cut", range(6))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == [0, 1, 2, 3, 4, 5]
    resumed = MetricsLog(tmp_path / "cut", PLAIN, {})
    resumed.truncate_after(3)
    record_run(tmp_path / "cut", range(4, 8), resumed)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_truncate_after_minus_one_starts_afresh(tmp_path):
    """A run killed before its first checkpoint leaves nothing; a run without files is left alone."""
    log = record_run(tmp_path, range(3))
    log.truncate_after(-1)
    assert read_metrics(tmp_path) == [] and read_samples(tmp_path) == []
    MetricsLog(tmp_path / "new", PLAIN, {}).truncate_after(5)
    assert list((tmp_path / "new").iterdir()) == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    """The events read back equal metrics.jsonl, also after an interruption. Leaves out how TensorBoard draws them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, LogConfig(), {})
    record_run(tmp_path, range(4), log)
    log.close()
    resumed = MetricsLog(tmp_path, LogConfig(), {})
    resumed.truncate_after(1)
    record_run(tmp_path, range(2, 5), resumed)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [event.step for event in events] == [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


def test_missing_wandb_is_named(monkeypatch):
    """Asking for W&B without the package is one line, among the checks of the options. Leaves out W&B itself."""
    monkeypatch.setattr("g2r_megatron.config.checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match="log.wandb.*not installed"):
        check_packages(LogConfig(tensorboard=False, wandb=True))


@pytest.mark.parametrize("content", ["{broken\n", "[1]\n", '{"a": 1}\n', '{"step": "1"}\n', '{"step": true}\n'])
def test_broken_metrics_line_is_named(tmp_path, content):
    """A line that is not a record with a step is an error that gives file and line."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + content)
    with pytest.raises(UserError, match="metrics.jsonl:2"):
        read_metrics(tmp_path)


def test_missing_run_directory_and_missing_file_are_named(tmp_path):
    """No directory, and a directory without metrics, are one-line errors."""
    with pytest.raises(UserError, match="no such run directory"):
        read_metrics(tmp_path / "absent")
    with pytest.raises(UserError, match="no metrics.jsonl"):
        read_metrics(tmp_path)


def run_progress():
    with Progress(total_steps=3, enabled=True) as progress:
        progress.message("resumed [at] step 0")
        progress.step(0, {"eval/true_score": 0.41})
        for step in (1, 2, 3):
            progress.phase("judge")
            progress.step(step, {"reward/mean": 0.5, "reward/true_mean": None, "time/step": 1.25})


def test_plain_output_is_one_line_a_step_without_control_codes(capsys, monkeypatch):
    """In a pipe: text lines only, even where colour is forced; the last step has no ETA."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    run_progress()
    lines = capsys.readouterr().out.splitlines()
    assert all(character.isprintable() for line in lines for character in line)
    assert lines[0] == "resumed [at] step 0"
    assert lines[1] == "step 0/3  eval true 0.410"
    assert lines[2].startswith("step 1/3  reward 0.500  step 1.2s  ETA 0:00")
    assert lines[4] == "step 3/3  reward 0.500  step 1.2s" and len(lines) == 5


def read_all(master):
    """What was written to a pseudo terminal; one read returns a part of it only."""
    drawn = b""
    while select.select([master], [], [], 0.05)[0]:
        drawn += os.read(master, 1 << 16)
    return drawn.decode()


def test_terminal_output_is_live(monkeypatch):
    """On a (pseudo) terminal the phase, the step and the reward are drawn. Leaves out the looks."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", "120")
        run_progress()
        monkeypatch.undo()
        terminal.flush()
        drawn = read_all(master)
    os.close(master)
    assert "judge" in drawn and "step 3/3" in drawn and "reward 0.500" in drawn and "resumed [at] step 0" in drawn


def test_disabled_progress_is_silent(capsys):
    """Ranks other than the first write nothing."""
    with Progress(total_steps=2, enabled=False) as progress:
        progress.phase("sample")
        progress.message("hello")
        progress.step(1, {"reward/mean": 0.1})
    assert capsys.readouterr().out == ""


def test_format_seconds():
    """Minutes and seconds, hours only when there are any."""
    assert [format_seconds(s) for s in (0, 61.4, 3599.6, 7325)] == ["0:00", "1:01", "1:00:00", "2:02:05"]


def test_every_line_stays_valid_json_for_hostile_text(tmp_path):
    """Newlines, quotes, NUL and lone surrogates in a response survive the round trip on one line."""
    hostile = 'a\n"\u2028</script>\x00\ud83d'
    MetricsLog(tmp_path, PLAIN, {}).sample({"step": 1, "response": hostile})
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "samples.jsonl").read_text())["response"] == hostile
    assert read_samples(tmp_path)[0]["response"] == hostile


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(tmp_path, monkeypatch):
    """Without a network or an account: WANDB_MODE=offline keeps the run in its directory. Leaves out the server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    record_run(tmp_path, range(2), MetricsLog(tmp_path, LogConfig(tensorboard=False, wandb=True), {"seed": 1})).close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_record_that_cannot_be_written_is_named(tmp_path, name):
    """The file and the cause in one line, as for a full disk (here the directory is gone)."""
    log = MetricsLog(tmp_path / "run", PLAIN, {})
    (tmp_path / "run").rmdir()
    with pytest.raises(UserError, match=f"run/{name}: cannot be written .No such file or directory"):
        log.log(1, {"a": 1.0}) if name == "metrics.jsonl" else log.sample({"step": 1})


def environment(tmp_path, **variables) -> dict[str, str]:
    """An environment whose home is empty."""
    return {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), **variables}


def test_wandb_login(tmp_path, capsys):
    """A key in the environment, in netrc (of the server that is meant) or in a settings file is a login; without one it is
    one line. Leaves out whether the server accepts it."""
    with pytest.raises(UserError, match=r"log.wandb: .*no login.*api.wandb.ai.*`wandb login`.*WANDB_MODE=offline"):
        check_wandb_login(environment(tmp_path, WANDB_API_KEY=""))
    check_wandb_login(environment(tmp_path, WANDB_API_KEY="a" * 40))
    check_wandb_login(environment(tmp_path, WANDB_IDENTITY_TOKEN_FILE="token"))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    check_wandb_login(environment(tmp_path))
    own = environment(tmp_path, WANDB_BASE_URL="https://wandb.example.org:8443")
    assert wandb_host(own) == ("wandb.example.org", 8443)
    with pytest.raises(UserError, match="wandb.example.org"):
        check_wandb_login(own)
    (tmp_path / ".netrc").write_text("machine")
    with pytest.raises(UserError, match="netrc cannot be read"):
        check_wandb_login(environment(tmp_path))


@pytest.mark.parametrize("mode", ["offline", "dryrun", "file"])
def test_wandb_offline_needs_no_login(tmp_path, mode, capsys):
    """Offline by the environment or by `wandb offline`, which writes a settings file: a note and no error."""
    warn.cache_clear()
    variables = {} if mode == "file" else {"WANDB_MODE": mode}
    if mode == "file":
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    check_wandb_login(environment(tmp_path, **variables))
    assert "offline" in capsys.readouterr().err and wandb_mode(environment(tmp_path, **variables)) == "offline"


@pytest.mark.parametrize("variables", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_wandb_disabled_contradicts_the_option(tmp_path, variables):
    with pytest.raises(UserError, match="log.wandb: true, but the environment disables"):
        check_wandb_login(environment(tmp_path, **variables))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the wandb extra")
def test_wandb_without_network(tmp_path, monkeypatch, capfd):
    """With the package itself: no server, so the run is kept offline and the log goes on. Leaves out a server that answers."""
    warn.cache_clear()
    for name, value in environment(tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    log = MetricsLog(tmp_path / "run", LogConfig(tensorboard=False, wandb=True), {})
    log.log(1, {"a": 1.0})
    log.close()
    assert "cannot be reached" in capfd.readouterr().err and list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_reachable(monkeypatch):
    """A server is reachable where a connection can be made, or the proxy's can."""
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reachable("127.0.0.1", port)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        assert reachable("nowhere.invalid", 443)
    assert not reachable("nowhere.invalid", 443)
