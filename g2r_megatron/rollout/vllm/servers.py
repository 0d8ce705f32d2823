"""Sampling on vLLM servers: other programs, which get the policy's weights after every update (rollout.vllm.mode servers)."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

import httpx
import torch
import torch.distributed as dist

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.errors import RunError, warn
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.parallel.agreement import union
from g2r_megatron.rollout.types import Request, Sampled, by_length
from g2r_megatron.rollout.vllm.requests import SCORING, sampling_fields
from g2r_megatron.rollout.vllm.server import GENERATE, NOT_KEPT, Server, ServerLost, WeightUpdate, described
from g2r_megatron.rollout.vllm.transfer import Bucket
from g2r_megatron.rollout.vllm.weights import all_buckets

END: Bucket = []  # of an update


class VLLMServersEngine:
    """Samples responses on servers, which are shared out over the ranks (collective over the world).

    A server that is lost is named in a warning and not asked again; the others take its requests.
    """

    def __init__(self, model: MegatronModel, config: RolloutConfig, stop_ids: set[int], timeout_minutes: float):
        """``model``: the policy; the servers have been checked (check_servers.py). Collective."""
        self.model, self.config, self.stop_ids = model, config, stop_ids
        self.version = 0  # how often the servers' weights have been replaced
        self._servers = [Server(url, timeout_minutes * 60) for url in config.vllm.urls]
        box = [secrets.token_hex(4)]
        dist.broadcast_object_list(box, src=0)
        self._run = box[0]  # another run's weights on a server have another version than ours

    @property
    def weight_version(self) -> str:
        """What the servers call the weights that they have from us."""
        return f"g2r-{self._run}-{self.version}"

    def rest(self) -> None:
        """Nothing to do: the servers' memory is not the policy's."""

    @torch.no_grad()
    def take_weights(self) -> None:
        """Put the policy's weights into every server, and forget what it has cached of prompts (collective).

        Raises ``RunError`` naming a tensor that did not come through as it was sent, or was not sent.
        """
        self.version += 1
        mine = self._mine()
        with ThreadPoolExecutor(2 * len(mine) or 1) as pool:
            updates = [update for server in mine if (update := _begun(server, pool))]
            try:
                for bucket in chain(all_buckets(self.model), [END]):
                    list(pool.map(WeightUpdate.send, updates, repeat(bucket)))
                list(pool.map(WeightUpdate.finish, updates))
            finally:
                for update in updates:
                    update.close()
            list(pool.map(self._accept_version, mine))
        self._agree()

    def _accept_version(self, server: Server) -> None:
        """The server's new weights get their name, and what was computed with the old ones is forgotten."""
        if server.lost:
            return
        try:
            server.post("/update_weight_version", {"new_version": self.weight_version})
            if not server.post("/reset_prefix_cache")["success"]:
                raise RunError(f"vLLM server {server.url} did not reset its prefix cache: does somebody else use it?")
        except ServerLost as lost:
            server.lost = str(lost)

    def generate(
        self,
        requests: Sequence[Request],
        temperature: float | None = None,
        on_progress: Callable[[int], None] = lambda n: None,
        between_batches: Callable[[], None] = lambda: None,
    ) -> list[Sampled]:
        """What was sampled for every request, in order, on every rank, with the log-probs of the sampled tokens.

        Prompts are shared out over the servers by their lengths. ``between_batches`` is called before sampling, and again
        before the requests of a lost server are sent to others.
        """
        temperature = self.config.temperature if temperature is None else temperature
        done: dict[int, Sampled] = {}
        while waiting := [i for i in by_length(requests) if i not in done]:
            between_batches()
            wanted = {
                i: {
                    "token_ids": requests[i].prompt_ids,
                    "sampling_params": sampling_fields(self.config, self.stop_ids, requests[i].key, temperature),
                }
                for i in waiting
            }
            answers = asyncio.run(self._answers(wanted, on_progress))
            mine = {i: _sampled(answer["choices"][0]) for part in answers.values() for i, answer in part.items()}
            done |= union(mine)
            self._agree()
        return [done[i] for i in range(len(requests))]

    def log_probs(self, sequences: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """By every server of this rank, as ``WeightsTaker`` of canary.py says."""
        wanted = {i: {"token_ids": ids, "sampling_params": SCORING} for i, ids in enumerate(sequences)}
        found = {}
        for server, answers in asyncio.run(self._answers(wanted, each=True)).items():
            if not server.lost:
                lists = [answers[i]["prompt_logprobs"][1:] for i in range(len(sequences))]
                found[f"vLLM server {server.url}"] = [
                    torch.tensor([entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries, strict=True)])
                    for ids, entries in zip(sequences, lists, strict=True)
                ]
        self._agree()
        return found

    async def _answers(
        self, wanted: dict[int, dict], on_progress: Callable[[int], None] = lambda n: None, each: bool = False
    ) -> dict[Server, dict[int, dict]]:
        """Answers of this rank's servers by the numbers of the requests; a lost server gives fewer.

        ``wanted`` has the requests of all ranks, of which each server gets a share, or with ``each`` all.
        ``rollout.batch_size`` requests are at a server at a time.
        """
        there, numbers = self._there(), list(wanted)
        answers: dict[Server, dict[int, dict]] = {server: {} for server in self._mine()}
        places = {server: asyncio.Semaphore(self.config.batch_size) for server in answers}
        timeout = httpx.Timeout(next(iter(answers)).timeout if answers else None, pool=None)

        async def ask(http: httpx.AsyncClient, server: Server, number: int) -> None:
            async with places[server]:
                if server.lost:
                    return
                try:
                    answer = server.content(await http.post(server.url + GENERATE, json=wanted[number]))
                except (httpx.TransportError, ServerLost) as error:
                    server.lost = str(error) if isinstance(error, ServerLost) else described(error)
                    return
                self._check_version(server, answer)
                answers[server][number] = answer
                on_progress(sum(map(len, answers.values())))

        async with httpx.AsyncClient(timeout=timeout, limits=NOT_KEPT, trust_env=False) as http:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for place, server in enumerate(there):
                        for number in numbers if each else numbers[place :: len(there)]:
                            if server in answers:
                                tasks.create_task(ask(http, server, number))
            except* RunError as errors:
                raise errors.exceptions[0] from None
        return answers

    def _check_version(self, server: Server, answer: dict) -> None:
        """Raise ``RunError`` unless every token was sampled, to its end, with the weights that we sent last."""
        choice = answer["choices"][0]
        found = {span["version"] for span in choice["weight_versions"] or []}
        if found != {self.weight_version}:
            raise RunError(
                f"vLLM server {server.url} answers with weights {', '.join(sorted(found)) or 'without a version'}, not with "
                f"{self.weight_version}: it was started again, or another run uses it"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise RunError(f"vLLM server {server.url} ended a response by {choice['finish_reason']}: who else uses it?")

    def _there(self) -> list[Server]:
        return [server for server in self._servers if not server.lost]

    def _mine(self) -> list[Server]:
        """The servers that this rank speaks to."""
        return [server for server in self._servers[dist.get_rank() :: dist.get_world_size()] if not server.lost]

    def _agree(self) -> None:
        """Tell every rank which servers are lost (collective). Raises ``RunError`` when none is left."""
        lost = union({server.url: server.lost for server in self._servers if server.lost})
        for server in self._servers:
            if server.url in lost:
                server.lost = lost[server.url]
                warn(f"vLLM server {server.url} is lost: {server.lost}; the others do its work")
        if not self._there():
            raise RunError(f"no vLLM server is left: {'; '.join(f'{url}: {reason}' for url, reason in lost.items())}")


def _begun(server: Server, pool: ThreadPoolExecutor) -> WeightUpdate | None:
    """An update that is under way; None, and the server noted as lost, where it does not listen any more."""
    try:
        return WeightUpdate(server, pool)
    except OSError as error:
        server.lost = str(error)
        return None


def _sampled(choice: dict) -> Sampled:
    """A choice of vLLM's answer; it ended by a stop token, which is its last, or was cut."""
    log_probs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    return Sampled(choice["token_ids"], choice["finish_reason"] == "stop", log_probs)
