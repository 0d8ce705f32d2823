"""``g2r serve`` over HTTP: its answers are those of ``g2r judge``, and no request keeps others from theirs.

One service on one rank answers all cases but the last: a torchrun of two ranks, one of which is killed. The judge is the
quickstart's. Leaves out parts without processes (tests/unit/test_serve_parts.py), the page (test_serve_page.py), Slurm, and
load over minutes (benchmarks/serve_soak.py).
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from g2r_megatron.client import AsyncJudge, Judge, JudgeError
from g2r_megatron.config import parsing
from g2r_megatron.config.options import GrpoConfig
from g2r_megatron.config.presets import PRESETS, fill_from_preset
from g2r_megatron.config.serve_options import ServeConfig
from g2r_megatron.credit.advantages import GroupScores, group_advantages
from g2r_megatron.data.tokenizer import encode_text
from g2r_megatron.data.tokenizer_files import load_tokenizer
from real_runs import forked
from scripts import load
from service import QUICKSTART, ROOT, Service
from test_alignment import byte_bpe
from tiny_models import build_tiny_reward_model

ROWS = [json.loads(line) for line in (QUICKSTART.parent / "data" / "responses.jsonl").read_text().splitlines() if line]
MODEL = QUICKSTART.parent / "model"
MOST_BYTES, RECEIVE_SECONDS, QUEUE = 100_000, 2.0, 6
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("service")
    byte_bpe(460).save_pretrained(directory / "bytes")
    more = load_tokenizer(MODEL)
    more.add_tokens(["<more>"])
    more.save_pretrained(directory / "more")
    tokenizers = {name: str(directory / name) for name in ("bytes", "more")}
    running = Service(
        directory,
        *("--serve.max_body_bytes", str(MOST_BYTES), "--serve.receive_seconds", str(RECEIVE_SECONDS)),
        *("--serve.queue_requests", str(QUEUE), "--serve.tokenizers", json.dumps(tokenizers)),
        *("--serve.max_responses", "8", "--serve.batch_rows", "8"),
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def url(service):
    return service.url()


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """What ``g2r judge`` writes of the same rows with the same options."""
    path = tmp_path_factory.mktemp("offline") / "judged.jsonl"
    config = QUICKSTART.with_name("judge.yaml")
    code, said = forked(["judge", "--config", str(config), "--output", str(path)], path.with_suffix(".log"))
    assert code == 0, said
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(row: dict) -> dict:
    """The part of a row that the service is told."""
    rubric = [{"criterion": item["criterion"], "weight": item["weight"]} for item in row["rubric"]]
    return {"prompt": row["prompt"], "rubric": rubric}


def close(found: list, expected: list) -> bool:
    return len(found) == len(expected) and found == pytest.approx(expected, abs=1e-6)


def test_credit_equals_the_offline_judge(url, offline):
    """Scores, verdicts, token weights and rewards of texts, all asked for at once; ``score`` gives the same without credit."""
    with ThreadPoolExecutor() as threads, Judge(url) as judge:
        credits = list(threads.map(lambda row: judge.credit([row["response"]], **asked(row))[0], ROWS))
        scores = list(threads.map(lambda row: judge.score([row["response"]], **asked(row))[0], ROWS))
    for row, credit, score, line in zip(ROWS, credits, scores, offline, strict=True):
        assert credit["reward"] == score["reward"] == pytest.approx(line["reward"])
        assert close(credit["token_rewards"], line["token_rewards"])
        tokens = [text.strip() for text in line["tokens"]]  # the first begins with a blank that the text does not have
        assert [row["response"][a:b].strip() for a, b in credit["spans"]] == tokens
        for item, other, expected in zip(credit["items"], score["items"], line["items"], strict=True):
            assert item["verdict"] == other["verdict"] == expected["verdict"]
            assert close([item["p_true"], other["p_true"]], [expected["p_true"]] * 2)
            assert (item["alpha"] is None) == (expected["alpha"] is None)
            assert item["alpha"] is None or close(item["alpha"], expected["alpha"])
    assert any(item["alpha"] for credit in credits for item in credit["items"])


def test_advantages_of_a_group_are_those_of_the_estimators(url):
    """Token ids of the judge with and without stop tokens; every estimator, from the answer's own verdicts and weights."""
    row = asked(ROWS[0])
    responses = [([9, 10, 11, 12], True), ([9, 13, 14], False), ([20, 21, 22, 23, 24], False)]
    lengths, finished = [3, 3, 5], [True, False, False]
    with Judge(url) as judge:
        for kind in ("sequence", "token_return", "itemwise", "sequence_weighted"):
            found = judge.credit(responses, **row, advantage=kind, mix=0.7, false_scale=0.5)
            verdicts = torch.tensor([[item["verdict"] for item in answer["items"]] for answer in found])
            weights = torch.tensor([item["weight"] for item in row["rubric"]], dtype=torch.float64)
            alphas = [
                [None if item["alpha"] is None else torch.tensor(item["alpha"][:n]) for item in answer["items"]]
                for answer, n in zip(found, lengths, strict=True)
            ]
            options = fill_from_preset(GrpoConfig(advantage=kind, mix=0.7, false_scale=0.5), PRESETS["robust"]["grpo"])
            expected = group_advantages(GroupScores(verdicts, weights, alphas, lengths, finished), options, 0.7)
            for answer, advantage, (ids, _) in zip(found, expected, responses, strict=True):
                assert len(answer["token_rewards"]) == len(ids)
                assert close(answer["advantages"], advantage.tolist())


def test_credit_for_the_tokens_of_other_tokenizers(url):
    """The same pieces with one more, which the judge reads as text, get the same credit; bytes get all of the reward."""
    row, text = asked(ROWS[0]), ROWS[0]["response"]
    own = encode_text(load_tokenizer(MODEL), text, continues=True)
    spelled = byte_bpe(460)(text, add_special_tokens=False)["input_ids"]
    with Judge(url) as judge:
        (by_ids,), (moved,), (by_bytes,) = (
            judge.credit([(ids, False)], **row, tokenizer=name)
            for ids, name in ((own, "judge"), (own, "more"), (spelled, "bytes"))
        )
    assert moved["sentences"] == by_ids["sentences"] and close(moved["token_rewards"], by_ids["token_rewards"])
    assert by_bytes["reward"] == by_ids["reward"] == pytest.approx(sum(by_bytes["token_rewards"]), abs=1e-6)
    assert len(by_bytes["token_rewards"]) == len(spelled) > len(own)
    assert len(by_bytes["sentences"]) == len(by_ids["sentences"]) > 1


def test_a_short_soak(url, offline):
    """Three clients, of whose requests some are malformed and some are left: no wrong answer, nothing of 5xx."""
    groups = [asked(row) | {"responses": [row["response"]]} for row in ROWS]
    clients = load("benchmarks/serve_soak.py").Load(url, groups, [[line] for line in offline], clients=3)
    counts = asyncio.run(clients.run(2.0, malformed=0.2, cancelled=0.1))
    assert counts.wrong == 0 and counts.server_errors() == 0
    assert counts.judged > 0 and {200, 422} <= counts.statuses.keys() and counts.health


def test_other_attributions_and_hidden_sentences(url):
    """Occlusion's weights follow from the margins that /v1/hide gives: max(b, 0) over sentences."""
    row, text = asked(ROWS[0]), ROWS[0]["response"]
    with Judge(url) as judge:
        (answer,) = judge.credit([text], **row, attribution="occlusion")
        count = len(answer["sentences"])
        hidden = judge._send("POST", "/v1/hide", {**row, "response": {"text": text}, "sentences": list(range(count))})
        with pytest.raises(JudgeError, match=r"422: options.attribution: l2; this service has gate, "):
            judge.credit([text], **row, attribution="l2")
    checked = 0
    for item, whole, without in zip(answer["items"], hidden["margins"], hidden["hidden"], strict=True):
        assert item["verdict"] == (whole > 0)
        lost = [max(whole - margin, 0.0) for margin in without]
        if item["verdict"] and sum(lost) > 1e-3:
            share = [sum(item["alpha"][a:b]) for a, b in answer["sentences"]]
            assert share == pytest.approx([x / sum(lost) for x in lost], abs=1e-4)
            checked += 1
    assert checked


def post(url: str, body: bytes | dict, path: str = "/v1/credit", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + path, content=content, headers={**JSON, **headers}, timeout=60)


GOOD = {"prompt": "tired.", "rubric": [{"criterion": "advises rest"}], "responses": [{"text": "rest."}]}
BAD_BODIES = {
    "no JSON": (b"{", 422),
    "deep": (b"[" * 50_000, 422),
    "deep in a field": (json.dumps(GOOD)[:-1].encode() + b', "id": ' + b"[" * 20_000 + b"}", 422),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', 422),
    "half a surrogate": (json.dumps(GOOD).replace("tired.", "\\ud800").encode(), 422),
    "NaN": (json.dumps(GOOD).replace("{\"criterion\"", "{\"weight\": NaN, \"criterion\"").encode(), 422),
    "infinite": (json.dumps(GOOD).replace("{\"criterion\"", "{\"weight\": 1e999, \"criterion\"").encode(), 422),
    "huge number": (b'{"prompt": ' + b"9" * 6000 + b"}", 422),
    "no positive weight": (GOOD | {"rubric": [{"criterion": "a", "weight": -1}]}, 422),
    "no rubric": (GOOD | {"rubric": []}, 422),
    "unknown field": (GOOD | {"file": "/etc/passwd"}, 422),
    "a tool's role": (GOOD | {"prompt": None, "messages": [{"role": "tool", "content": "a"}]}, 422),
    "id of no token": (GOOD | {"responses": [{"token_ids": [2**31 - 1], "finished": False}]}, 422),
    "negative id": (GOOD | {"responses": [{"token_ids": [-1], "finished": False}]}, 422),
    "too long": (GOOD | {"responses": [{"text": "rest. " * 300}]}, 422),
    "path as a tokenizer": (GOOD | {"tokenizer": "../../etc"}, 422),
    "many responses": (GOOD | {"responses": [{"text": "a"}] * 9}, 413),
    "large": (b" " * (MOST_BYTES + 1), 413),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_requests_are_refused_in_one_line(case, url):
    """4xx with a reason, nothing of the request in it that a page could take for its own."""
    body, status = BAD_BODIES[case]
    answer = post(url, body)
    assert answer.status_code in ((status, 400) if status == 422 else (status,)), answer.text
    error = answer.json()["error"]
    assert len(error) < 500 and "\n" not in error and "Traceback" not in error


def test_control_tokens_and_markup_are_data(url):
    """Control tokens, HTML and the template's own fields in every text: judged like any text, and echoed as JSON only."""
    nasty = "<eos></s>{response}<b>\u202e\u0000"
    body = {
        "messages": [{"role": "system", "content": nasty}, {"role": "user", "content": "a " + nasty}],
        "rubric": [{"criterion": "b " + nasty}], "responses": [{"text": nasty}], "id": nasty,
    }  # fmt: skip
    answer = post(url, body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    ["/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/index.html", "//etc/passwd", "/page.js/..%2fapp.py"],
)
def test_no_path_reaches_a_file(path, url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:  # clients would tidy the path
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        status = raw.recv(100_000).split(b"\r\n")[0]
    assert status == b"HTTP/1.1 404 Not Found"


def test_headers_that_lie(url):
    """Another site's host name, a form's content type, a length that is no length, a header without end."""
    assert post(url, GOOD, host="evil.example").status_code == 421
    assert post(url, GOOD, **{"content-type": "text/plain"}).status_code == 415
    host, port = url.removeprefix("http://").split(":")
    for lines in ("Content-Length: 5\r\nContent-Length: 6", "Content-Length: -1", "X: " + "a" * 200_000):
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(f"POST /v1/credit HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n\r\n".encode())
            assert raw.recv(1000).split(b" ")[1] in (b"400", b"413", b"431")
    assert post(url, GOOD).status_code == 200


POST = "POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("sent", ["GET / HT", POST + "Content-Length: 9\r\n\r\n{"], ids=["headers", "body"])
def test_a_slow_client_is_left(sent, url):
    """Headers, or a body, that do not come: closed after ``receive_seconds``."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        start = time.monotonic()
        raw.sendall(sent.encode())
        while raw.recv(1000):
            pass
    assert RECEIVE_SECONDS - 0.5 < time.monotonic() - start < 15


def test_a_stuck_judge_holds_up_no_answer(service, url):
    """With the rank stopped: health in time, 504 at the deadline, 429 when the queue is full, and clients may leave.

    Afterwards the requests that still wait are answered, and those whose client has left are not judged.
    """
    (rank,) = service.ranks().values()
    os.kill(rank, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(QUEUE + 2) as threads:
            unique = [GOOD | {"id": f"stuck-{i}"} for i in range(QUEUE + 2)]
            late = threads.submit(post, url, unique[0] | {"options": {"deadline_seconds": 1}})
            assert late.result().status_code == 504  # the judge has begun with this one
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + "/v1/credit", json=unique[1], timeout=0.5)
            waiting = [threads.submit(post, url, body) for body in unique[2:]]
            time.sleep(1.0)
            full = post(url, GOOD | {"id": "one too many"})
            assert full.status_code == 429 and int(full.headers["retry-after"]) > 0
            start = time.monotonic()
            assert httpx.get(url + "/healthz").status_code == 200
            assert time.monotonic() - start < 1
            os.kill(rank, signal.SIGCONT)
            assert [answer.result().status_code for answer in waiting] == [200] * QUEUE
    finally:
        os.kill(rank, signal.SIGCONT)
    metrics = httpx.get(url + "/metrics").text
    for status in (504, 499, 429):
        assert f'g2r_requests_total{{route="/v1/credit",status="{status}"}}' in metrics
    assert "g2r_requests_waiting 0.0" in metrics


def test_an_answer_is_kept_for_a_retry(url):
    def judged() -> str:
        lines = httpx.get(url + "/metrics").text.splitlines()
        return next(line for line in lines if line.startswith("g2r_batch_responses_sum"))

    body = GOOD | {"id": "again"}
    first, before = post(url, body), judged()
    again = post(url, body | {"options": {"deadline_seconds": 9}})
    assert first.content == again.content and judged() == before


def test_the_documented_schema_is_that_of_the_routes(url):
    schema = httpx.get(url + "/openapi.json").json()
    assert {"/v1/credit", "/v1/score", "/v1/hide", "/v1/models", "/healthz", "/metrics"} <= schema["paths"].keys()
    assert "deadline_seconds" in schema["components"]["schemas"]["CreditOptions"]["properties"]


def credit_here(requests: list[tuple]) -> list[list[dict]]:
    """What a judge in this process gives."""
    from g2r_megatron.serve.local import LocalJudge

    judge = LocalJudge(parsing.parse(ServeConfig, "test", ["--config", str(QUICKSTART)]))
    with pytest.raises(JudgeError, match="422: rubric: is missing"):
        judge.credit(["a"], prompt="b")
    with pytest.raises(JudgeError, match="422: body: Value error, prompt must hold a text"):
        judge.score(["a"], ["b"], prompt=" ")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return [judge.credit(responses, rubric, **options) for responses, rubric, options in requests]


def test_trl_trains_on_the_credit(url, worlds, tmp_path, monkeypatch):
    """Ten steps of TRL's own GRPO on the quickstart's task: its advantages are the service's, and the score rises.

    A judge in the process gives the same advantages for the last batch. Leaves out several processes and chat prompts.
    """
    make_trainer = load("examples/trl/run.py").make_trainer
    asked_for, batches, requests = [], [], []

    class Recorded(Judge):
        def credit(self, responses, rubric=(), **options):
            found = super().credit(responses, rubric, **options)
            asked_for.extend((tuple(ids), answer) for (ids, _), answer in zip(responses, found, strict=True))
            requests.append(((responses, rubric, options), found))
            return found

    with Recorded(url) as judge:
        trainer = make_trainer(judge, 10, str(tmp_path))
        generate = trainer._generate_and_score_completions
        monkeypatch.setattr(
            trainer, "_generate_and_score_completions", lambda inputs: batches.append(generate(inputs)) or batches[-1]
        )
        trainer.train()
    answers = asked_for[-48:]  # of the last step
    last, compared = batches[-1], 0
    for ids, mask, advantages in zip(last["completion_ids"], last["completion_mask"], last["advantages"], strict=True):
        size = int(mask.sum())
        found = [answer for given, answer in answers if given == tuple(ids[:size].tolist())]
        assert found and advantages.shape == ids.shape and not advantages[size:].any()
        if len(found) == 1:  # not sampled for two prompts
            assert close(advantages[:size].tolist(), found[0]["advantages"])
            compared += 1
    assert compared > 24
    assert any(len(set(advantages.tolist())) > 3 for advantages in last["advantages"])
    scores = [record["reward"] for record in trainer.state.log_history if "reward" in record]
    assert len(scores) == 10 and sum(scores[-3:]) > sum(scores[:3]), scores
    asked, answered = zip(*requests[-6:], strict=True)
    for group, other in zip(worlds[1].run(credit_here, list(asked))[0], answered, strict=True):
        assert [one["reward"] for one in group] == [one["reward"] for one in other]
        assert all(close(a["advantages"], b["advantages"]) for a, b in zip(group, other, strict=True))


def scores_here(model: str, rows: str, judged: str) -> tuple[list[dict], list[dict]]:
    """What ``g2r judge`` and a judge in this process say of the same responses by a reward model."""
    from g2r_megatron.cli import judge_command
    from g2r_megatron.serve.local import LocalJudge

    options = ["--judge.model", model, "--preset", "robust"]
    judge_command([*options, "--input", rows, "--output", judged])
    judge = LocalJudge(parsing.parse(ServeConfig, "test", options))
    with pytest.raises(JudgeError, match="422: rubric: is there, but the judge is a reward model"):
        judge.credit(["a"], ["b"], prompt="c")
    offline = [json.loads(line) for line in Path(judged).read_text().splitlines()]
    asked = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    return offline, judge.credit([row["response"] for row in asked], prompt=asked[0]["prompt"])


def test_a_reward_model(worlds, tmp_path):
    """No rubric; the score, and its credit, are those of ``g2r judge``. Leaves out HTTP, which is the same for all judges."""
    model = build_tiny_reward_model("qwen2", tmp_path / "model")
    responses = ["Rest. Drink water. See a doctor.", "Nothing to do."]
    rows = [{"id": i, "prompt": "I have a fever.", "response": response} for i, response in enumerate(responses)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(tmp_path / name) for name in ("rows.jsonl", "judged.jsonl")]
    ((offline, answers),) = worlds[1].run(scores_here, str(model), *paths)
    for line, answer in zip(offline, answers, strict=True):
        assert "items" not in answer and answer["reward"] == pytest.approx(line["reward"])
        assert len(set(answer["token_rewards"])) > 1
        for name in ("token_rewards", "alpha"):
            assert close(answer[name][: len(line[name])], line[name]) and not any(answer[name][len(line[name]) :])


def test_sigterm_answers_what_was_accepted(service, url):
    """A request under way is answered; then exit code 0, no rank left, no URL file."""
    (rank,) = service.ranks().values()
    os.kill(rank, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(post, url, GOOD | {"id": "last"})
        time.sleep(0.5)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        os.kill(rank, signal.SIGCONT)
        assert waiting.result().status_code == 200
    assert service.process.wait(60) == 0, service.log.read_text()
    assert not service.ranks() and not service.url_file.exists()


def test_a_killed_rank_of_two(tmp_path):
    """kill -9 of the second rank: 503 within 10 s, a client's retries succeed after the restart, and the answer is the same."""
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    service = Service(tmp_path, "--serve.launcher", torchrun, "--judge.layout.tp", "2", G2R_API_KEY="k" * 32)
    row, text = asked(ROWS[0]), ROWS[0]["response"]
    try:
        url = service.url()
        assert post(url, GOOD).status_code == 401
        with Judge(url, api_key="k" * 32, retry_seconds=150) as judge:
            before = judge.credit([text], **row)
            ranks = service.ranks()
            os.kill(ranks[0], signal.SIGSTOP)  # so that the request is under way when the rank dies
            with ThreadPoolExecutor(1) as threads:
                waiting = threads.submit(post, url, GOOD | {"id": "killed"}, authorization="Bearer " + "k" * 32)
                time.sleep(0.5)
                os.kill(ranks[1], signal.SIGKILL)
                os.kill(ranks[0], signal.SIGCONT)
                assert waiting.result(10).status_code == 503
            after = judge.score([text], **row)
            assert service.ranks()[0] != ranks[0]
            for now, then in zip(after[0]["items"], before[0]["items"], strict=True):
                assert now["p_true"] == pytest.approx(then["p_true"], abs=1e-6)
        assert service.stop() == 0
    finally:
        service.stop()


def test_the_asynchronous_client_and_one_that_gives_up():
    """Nobody listens: the client says so after its time."""

    async def ask() -> None:
        async with AsyncJudge("http://127.0.0.1:9", retry_seconds=1.0) as judge:
            await judge.score(["a"], ["b"], prompt="c")

    with pytest.raises(JudgeError, match="cannot be reached"):
        asyncio.run(ask())


def test_the_client_imports_neither_torch_nor_megatron():
    code = (
        "import sys, time; start = time.process_time(); import g2r_megatron.client; seconds = time.process_time() - start; "
        "print(seconds, sorted({'torch', 'megatron', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert all(found[1] == "[]" for found in runs)
    assert min(float(found[0]) for found in runs) < 0.3


def test_the_front_imports_no_torch():
    code = "import sys; import g2r_megatron.serve.front; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(ROOT), check=True)
    assert done.stdout == "[]\n"
