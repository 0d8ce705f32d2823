"""``rollout.vllm.urls``: which servers are accepted, by their addresses alone."""

from ipaddress import ip_address
from urllib.parse import urlsplit

from g2r_megatron.config.options import VLLMConfig
from g2r_megatron.errors import UserError


def check_urls(vllm: VLLMConfig) -> None:
    """Raise ``UserError`` for urls that are none, are there twice, or are reached by others. Asks no server."""
    option, example = "rollout.vllm.urls", 'give e.g. ["http://127.0.0.1:8000"]'
    if not vllm.urls:
        raise UserError(option, "none, with rollout.vllm.mode servers", example)
    if len(set(vllm.urls)) < len(vllm.urls):
        raise UserError(option, f"the same server twice in {vllm.urls}", "name each once")
    if vllm.options:
        raise UserError(
            "rollout.vllm.options", f"{vllm.options} with rollout.vllm.mode servers", "give them to the servers"
        )
    for url in vllm.urls:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(option, f"{url} ({error})", example) from error
        if parts.scheme not in ("http", "https") or not host or port == 0 or parts.path.strip("/") or parts.query:
            raise UserError(option, url, example)
        if not vllm.behind_proxy and not _is_loopback(host):
            raise UserError(
                option,
                f"{url} is not on loopback: whoever reaches a server can replace its weights and call its workers",
                "put it behind a proxy that lets in this job alone (docs/rollouts.md) and set rollout.vllm.behind_proxy true",
            )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
