"""Files of sampled responses: what is read is what was written; what does not fit is refused in one line.

Leaves out training from them (tests/runs/test_replay.py), which also makes the facts that are compared here.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from g2r_megatron.config.checks import _check_engine, _check_recordings
from g2r_megatron.config.options import HeldOutConfig, RolloutConfig, TrainConfig
from g2r_megatron.errors import UserError
from g2r_megatron.rollout.facts import check_dump, check_replay
from g2r_megatron.rollout.recording import Dump, eval_name, read_batch, read_header, recorded_files, step_name
from g2r_megatron.rollout.types import Request, Sampled

FACTS = {"seed": 1, "rollout.responses_per_prompt": 2, "policy.model": "a", "tokenizer": "b", "data.train": "c"}
VOCAB = 50


def sampled(log_probs: bool) -> tuple[list[Request], list[Sampled]]:
    """Three responses: one that ended, one that was cut, one without tokens."""
    requests = [Request([1, 2, 3], "1/1/q/0"), Request([1, 2, 3], "1/1/q/1"), Request([4], "1/1/r/0")]
    tokens = [[5, 6, 2], [VOCAB - 1], []]
    values = torch.randn(4, generator=torch.Generator().manual_seed(1)).split([3, 1, 0])
    return requests, [
        Sampled(ids, ids[-1:] == [2], part.tolist() if log_probs else None)
        for ids, part in zip(tokens, values, strict=True)
    ]


def dump_of(directory, *names: str, log_probs: bool = False, facts=FACTS) -> Dump:
    dump = Dump(directory, facts, done=0)
    requests, found = sampled(log_probs)
    for name in names:
        dump.write(name, requests, found, [{"key": request.key} for request in requests])
    return dump


def config_of(directory, steps: int, **rollout) -> TrainConfig:
    return TrainConfig(steps=steps, rollout=RolloutConfig(replay=str(directory), **rollout))


@pytest.mark.parametrize("log_probs", [False, True])
def test_what_is_read_is_what_was_written(tmp_path, log_probs):
    """Tokens, ends and log-probs bit for bit (fp32), without temporary files; people get a line a response."""
    dump_of(tmp_path / "dump", step_name(3), log_probs=log_probs)
    path = tmp_path / "dump" / "step_00000003.safetensors"
    requests, found = sampled(log_probs)
    expected = {request.key: (request.prompt_ids, one) for request, one in zip(requests, found, strict=True)}
    assert read_batch(path, VOCAB) == expected
    assert read_header(path) == (FACTS, [request.key for request in requests], log_probs)
    assert recorded_files(path.parent) == [(3, path)] and len(list(path.parent.iterdir())) == 2
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [request.key for request in requests]


def test_steps_that_come_again_are_forgotten(tmp_path):
    """A run that goes on after step 1 keeps that step and the evaluations up to it; one from the start keeps nothing."""
    dump_of(tmp_path, eval_name(0), step_name(1), eval_name(1), step_name(2), eval_name(2))
    Dump(tmp_path, FACTS, done=1)
    assert [path.stem for _, path in recorded_files(tmp_path)] == ["eval_00000000", "eval_00000001", "step_00000001"]
    assert len(list(tmp_path.iterdir())) == 6  # the lines for people go with them
    Dump(tmp_path, FACTS, done=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 2, "sampled with seed 1, here 2"),
        ("rollout.responses_per_prompt", 4, "rollout.responses_per_prompt 2, here 4"),
        ("policy.model", "x", "config or weights (policy.model)"),
        ("tokenizer", "x", "other tokens (tokenizer)"),
        ("data.train", "x", "prompts or their order (data.train)"),
    ],
)
def test_a_dump_of_something_else(tmp_path, name, value, said):
    dump_of(tmp_path, step_name(1))
    check_replay(config_of(tmp_path, 1), FACTS)
    with pytest.raises(UserError, match="^rollout.replay: ") as error:
        check_replay(config_of(tmp_path, 1), FACTS | {name: value})
    assert said in str(error.value) and "step_00000001" in str(error.value)


def test_steps_and_evaluations_that_were_not_recorded(tmp_path):
    """Fewer steps than are asked for, one missing in between, no evaluation where one is due; none at all."""
    with pytest.raises(UserError, match="no recorded steps"):
        check_replay(config_of(tmp_path, 1), FACTS)
    dump_of(tmp_path, *(step_name(step) for step in (1, 2, 4)), eval_name(0), facts=FACTS | {"eval.data": "d"})
    with pytest.raises(UserError, match="has 3 steps, and step 3 of 5 is not among them; set steps to 2"):
        check_replay(config_of(tmp_path, 5), FACTS)
    check_replay(config_of(tmp_path, 2), FACTS)  # without evaluation
    config = config_of(tmp_path, 2)
    config.eval = HeldOutConfig(every=1)
    with pytest.raises(UserError, match="no evaluation after step 1; set eval.every"):
        check_replay(config, FACTS | {"eval.data": "d"})
    with pytest.raises(UserError, match=r"other prompts or their order \(eval.data\)"):
        check_replay(config, FACTS | {"eval.data": "e"})


def test_files_that_are_not_whole(tmp_path):
    """Cut short, of another kind, with tokens that the policy does not have."""
    dump_of(tmp_path, step_name(1))
    path = tmp_path / "step_00000001.safetensors"
    with pytest.raises(UserError, match="token ids from 1 to 49 in a vocabulary of 49"):
        read_batch(path, VOCAB - 1)
    content = path.read_bytes()
    for size in (len(content) - 1, 100, 4, 0):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"step_00000001.safetensors cannot be read \(.*copy the file again"):
            check_replay(config_of(tmp_path, 1), FACTS)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="is not a file of rollout.dump"):
        check_replay(config_of(tmp_path, 1), FACTS)


def test_a_dump_into_the_folder_of_another_run(tmp_path):
    """Refused, unless this run goes on; then it must sample as before."""
    config = TrainConfig(rollout=RolloutConfig(dump=str(tmp_path / "dump")))
    check_dump(config, FACTS, goes_on=False)  # not there yet
    dump_of(tmp_path / "dump", step_name(1))
    with pytest.raises(UserError, match="holds the rollouts of another run"):
        check_dump(config, FACTS, goes_on=False)
    check_dump(config, FACTS, goes_on=True)
    with pytest.raises(UserError, match="sampled with seed 1, here 2; set it so, or give another rollout.dump"):
        check_dump(config, FACTS | {"seed": 2}, goes_on=True)


def test_options_that_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="is rollout.replay too"):
        _check_recordings(RolloutConfig(dump=f"{tmp_path}/.", replay=str(tmp_path)))
    with pytest.raises(UserError, match="no directory"):
        _check_recordings(RolloutConfig(replay=str(tmp_path / "none")))


def test_correction_of_a_replay(tmp_path):
    """Needs a sampler's log-probs in the dump, of all tokens; vLLM itself need not be there."""
    dump_of(tmp_path / "vllm", step_name(1), log_probs=True)
    dump_of(tmp_path / "megatron", step_name(1))
    check_replay(config_of(tmp_path / "vllm", 1, correction="tis"), FACTS)
    with pytest.raises(UserError, match=r"rollout.correction: tis, but .*has no log-probs"):
        check_replay(config_of(tmp_path / "megatron", 1, correction="tis"), FACTS)
    _check_engine(RolloutConfig(engine="vllm", replay="dump", correction="tis"))
    with pytest.raises(UserError, match=r"rollout.correction: tis with rollout.top_p 0.9"):
        _check_engine(RolloutConfig(replay="dump", correction="tis", top_p=0.9))
