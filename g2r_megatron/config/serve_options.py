"""Every option of ``g2r serve``: those of the service and those of the judge behind it."""

from dataclasses import dataclass, field
from typing import Literal

from g2r_megatron.config.options import Attribution, JudgeConfig

API_KEY_VARIABLE = "G2R_API_KEY"


@dataclass
class ServiceConfig:
    """The HTTP service in front of the judge's ranks."""

    host: str = "127.0.0.1"
    """address to listen on; any other than loopback needs an API key"""
    port: int = 8000
    """port to listen on; 0: any free one"""
    url_file: str = ""
    """file that gets the service's URL once the judge is ready, and is removed at the end"""
    api_key_file: str = ""
    """file of the key that clients must send (Authorization: Bearer KEY); none: the environment's G2R_API_KEY, if set"""
    launcher: str = ""
    """command that starts the judge's ranks, e.g. `torchrun --standalone --nproc-per-node 8`; none: one rank"""
    tokenizers: dict[str, str] = field(default_factory=dict)
    """names of other tokenizers than the judge's whose token ids requests may hold, and their directories"""
    attributions: list[Attribution] = field(default_factory=list)
    """values of judge.attribution that a request may choose beside the judge's own"""
    batch_rows: int = 64
    """responses judged at a time; requests that wait are packed together up to it"""
    batch_wait_ms: int = 5
    """an idle judge waits so long for further requests before it begins"""
    queue_requests: int = 256
    """requests that may wait; more are answered 429"""
    queue_bytes: int = 64 * 2**20
    """bytes of the requests that may wait; more are answered 429"""
    max_body_bytes: int = 2 * 2**20
    """of a request"""
    max_responses: int = 64
    """responses of a request"""
    max_items: int = 64
    """rubric items of a request"""
    deadline_seconds: float = 300.0
    """a request that is not answered by then is answered 504; a request may ask for less"""
    receive_seconds: float = 20.0
    """a client must have sent its headers, and then its body, within so long"""
    max_connections: int = 1024
    """open connections; more are answered 503"""
    cache_bytes: int = 64 * 2**20
    """answers that are kept for requests that come again; 0: none"""
    drain_seconds: float = 60.0
    """time after SIGTERM for the requests that have been accepted"""
    max_restarts: int = 5
    """so many restarts of the judge's ranks in a row, without an answer between them, end the service"""


@dataclass
class ServeConfig:
    """Everything `g2r serve` reads."""

    serve: ServiceConfig = field(default_factory=ServiceConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    preset: Literal["paper", "robust"] = "robust"
    """fills judge.target, attribution, normalize, standardize and smoothing where they are not given, and the estimator of
    advantages where a request gives none"""
    seed: int = 1234
    """of sampled verdicts"""
