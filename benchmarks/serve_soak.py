"""``g2r serve`` under load: throughput against ``g2r judge``, time of /healthz, memory, and every answer against the offline one.

    python benchmarks/serve_soak.py --seconds 1800 --output benchmarks/results/serve_soak.md

Clients on loopback ask for the credit of groups of responses, each with an id of its own, so that none comes from the
cache. First all requests are good, which measures throughput; then --malformed of them cannot be judged and --cancelled
of the clients leave early. ``g2r judge`` judges the same rows, in turns with the clients; its throughput leaves out its
start. Needs no GPU; the judge is the quickstart's.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
TOLERANCE = 1e-5  # of a token's reward: rows are packed in another order
GROUP = 8
MALFORMED = [b"{", b"\xff", b"[" * 5000, b'{"prompt": "a", "rubric": [{"criterion": "b", "weight": NaN}]}', b"{}"]


def make_groups(count: int) -> list[dict]:
    """``count`` prompts of the quickstart, each with ``GROUP`` responses of six of its sentences."""
    rng = random.Random(1)
    queries = [json.loads(line) for line in (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()]
    lines = (QUICKSTART / "data" / "responses.jsonl").read_text().splitlines()
    sentences = sorted({part for line in lines for part in json.loads(line)["response"].rstrip(".").split(". ")})
    groups = []
    for query in rng.sample(queries, count):
        rubric = [{"criterion": item["criterion"], "weight": item["weight"]} for item in query["rubric"]]
        responses = [". ".join(rng.sample(sentences, 6)) + "." for _ in range(GROUP)]
        groups.append({"prompt": query["prompt"], "rubric": rubric, "responses": responses})
    return groups


def judge_offline(groups: list[dict], directory: Path) -> tuple[list[list[dict]], float]:
    """(output lines of ``g2r judge`` of each group, responses a second from its first batch to its last) of the groups' responses."""
    rows, output = directory / "rows.jsonl", directory / "judged.jsonl"
    with rows.open("w") as file:
        for number, group in enumerate(groups):
            for i, response in enumerate(group["responses"]):
                row = {
                    "id": f"{number}-{i}",
                    "prompt": group["prompt"],
                    "rubric": group["rubric"],
                    "response": response,
                }
                file.write(json.dumps(row) + "\n")
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "g2r_megatron.cli", "judge", "--config", str(QUICKSTART / "judge.yaml")]
    command += ["--input", str(rows), "--output", str(output)]
    done = []  # (time, rows) of each batch
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if match := re.search(r"judged (\d+)/", line):
                done.append((time.monotonic(), int(match[1])))
    (first, few), (last, all_) = done[0], done[-1]
    lines = iter(output.read_text().splitlines())
    judged = [[json.loads(next(lines)) for _ in group["responses"]] for group in groups]
    return judged, (all_ - few) / (last - first)


class Service:
    """A service of its own on any free port."""

    def __init__(self, directory: Path):
        url_file = directory / "url"
        command = [sys.executable, "-m", "g2r_megatron.cli", "serve", "--config", str(QUICKSTART / "serve.yaml")]
        self.process = subprocess.Popen([*command, "--serve.port", "0", "--serve.url_file", str(url_file)], cwd=ROOT)
        while not url_file.exists():
            if self.process.poll() is not None:
                raise SystemExit("the service has ended")
            time.sleep(0.1)
        self.url = url_file.read_text().strip()

    def megabytes(self) -> float:
        """Memory of the front and all that it has started."""
        front = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [front, *front.children(recursive=True)]) / 1e6

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


@dataclass
class Counts:
    """What the clients saw."""

    statuses: dict[int, int] = field(default_factory=dict)
    wrong: int = 0
    judged: int = 0  # responses
    cancelled: int = 0
    health: list[float] = field(default_factory=list)  # seconds

    def add(self, other: "Counts") -> None:
        for status, count in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count
        self.wrong += other.wrong
        self.judged += other.judged
        self.cancelled += other.cancelled
        self.health += other.health

    def server_errors(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 500)


class Load:
    """Clients of one service."""

    def __init__(self, url: str, groups: list[dict], expected: list[list[dict]], clients: int):
        self.url, self.groups, self.expected, self.clients = url, groups, expected, clients
        self.rng, self.asked = random.Random(2), 0

    async def run(self, seconds: float, malformed: float = 0.0, cancelled: float = 0.0) -> Counts:
        counts, end = Counts(), time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits, trust_env=False) as http:
            clients = [self._client(http, counts, end, malformed, cancelled) for _ in range(self.clients)]
            await asyncio.gather(self._watch(http, counts, end), *clients)
        return counts

    async def _client(self, http: httpx.AsyncClient, counts: Counts, end: float, malformed: float, cancelled: float):
        while time.monotonic() < end:
            draw = self.rng.random()
            if draw < malformed:
                content = self.rng.choice(MALFORMED)
                answer = await http.post("/v1/credit", content=content, headers={"content-type": "application/json"})
                counts.wrong += not 400 <= answer.status_code < 500
            else:
                number = self.rng.randrange(len(self.groups))
                timeout = self.rng.uniform(0.001, 0.2) if draw < malformed + cancelled else 120
                try:
                    answer = await http.post("/v1/credit", json=self._request(number), timeout=timeout)
                except httpx.TimeoutException:
                    counts.cancelled += 1
                    continue
                self._compare(number, answer, counts)
            counts.statuses[answer.status_code] = counts.statuses.get(answer.status_code, 0) + 1

    def _request(self, number: int) -> dict:
        self.asked += 1
        group = self.groups[number]
        responses = [{"text": text} for text in group["responses"]]
        return {**group, "responses": responses, "id": f"{os.getpid()}-{self.asked}"}

    def _compare(self, number: int, answer: httpx.Response, counts: Counts) -> None:
        if answer.status_code != 200:
            counts.wrong += 1
            return
        for found, line in zip(answer.json()["responses"], self.expected[number], strict=True):
            rewards = zip(found["token_rewards"], line["token_rewards"], strict=True)
            verdicts = [item["verdict"] for item in found["items"]] == [item["verdict"] for item in line["items"]]
            counts.wrong += not verdicts or max(abs(a - b) for a, b in rewards) > TOLERANCE
            counts.judged += 1

    async def _watch(self, http: httpx.AsyncClient, counts: Counts, end: float) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=30, trust_env=False) as own:
            while time.monotonic() < end:
                start = time.perf_counter()
                counts.wrong += (await own.get("/healthz")).status_code != 200
                counts.health.append(time.perf_counter() - start)
                await asyncio.sleep(0.05)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def report(
    options: argparse.Namespace,
    offline: list[float],
    online: list[float],
    good: Counts,
    soak: Counts,
    growth: float,
    megabytes: float,
) -> str:
    """The results as Markdown."""
    health = [second * 1e3 for second in good.health + soak.health]
    ratio = statistics.median(b / a for a, b in zip(offline, online, strict=True))
    rates = [", ".join(f"{rate:.0f}" for rate in rates) for rates in (offline, online)]
    rows = {
        "`g2r judge`, in turns with the next": f"{rates[0]} responses/s",
        "the service, good requests": f"{rates[1]} responses/s; median {ratio:.2f} of `g2r judge`",
        "/healthz under load": f"p50 {percentile(health, 0.5):.1f} ms, p99 {percentile(health, 0.99):.1f} ms of {len(health)}",
        "answers in the soak, by status": f"{dict(sorted(soak.statuses.items()))}; {soak.cancelled} clients left",
        "responses compared with `g2r judge`": f"{good.judged + soak.judged}",
        f"wrong answers (tolerance {TOLERANCE:g} a token)": f"{good.wrong + soak.wrong}",
        "answers of 5xx": f"{good.server_errors() + soak.server_errors()}",
        "memory of all processes after the soak": f"{megabytes:.0f} MB, {growth:+.1%} of that before it",
    }
    return (
        "# `g2r serve` under load\n\n"
        f"`benchmarks/serve_soak.py --seconds {options.seconds:g} --clients {options.clients}` on {os.cpu_count()} CPU "
        f"cores, which the clients share. The quickstart's judge, {GROUP} responses a request; in the soak "
        f"{options.malformed:.0%} of the requests are malformed and {options.cancelled:.0%} of the clients leave early.\n\n"
        "| what | found |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800.0, help="of the soak (%(default)s)")
    parser.add_argument("--throughput-seconds", type=float, default=30.0, help="of good requests alone before it")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput, in turns with g2r judge (%(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="at the same time (%(default)s)")
    parser.add_argument("--groups", type=int, default=200, help="prompts with 8 responses each (%(default)s)")
    parser.add_argument("--malformed", type=float, default=0.1, help="share of requests (%(default)s)")
    parser.add_argument("--cancelled", type=float, default=0.05, help="share of requests (%(default)s)")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    groups = make_groups(options.groups)
    offline, online, good = [], [], Counts()
    with tempfile.TemporaryDirectory() as name:
        service = Service(Path(name))
        try:
            load = Load(service.url, groups, [], options.clients)  # one for all rounds: no id comes twice
            for _ in range(options.rounds):  # in turns: other work on the machine slows both
                load.expected, rate = judge_offline(groups, Path(name))
                offline.append(rate)
                found = asyncio.run(load.run(options.throughput_seconds))
                online.append(found.judged / options.throughput_seconds)
                good.add(found)
            before = service.megabytes()
            soak = asyncio.run(load.run(options.seconds, options.malformed, options.cancelled))
            after = service.megabytes()
        finally:
            service.stop()
    text = report(options, offline, online, good, soak, after / before - 1, after)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
