"""What ``verify_checkpoint.py`` prints: what differs between two checkpoints, and one line that sums it up."""

import hashlib

import torch.distributed as dist

from g2r_megatron.convert.logits import compare_logits
from g2r_megatron.convert.verify import TensorReport, compare_configs, compare_tensors, open_sides
from g2r_megatron.errors import UserError


def verify(paths: tuple[str, str], hashes: bool, logits: bool, text: str | None) -> int:
    """Compare and print on the first process (collective). 0: equal; 1: different.

    ``hashes``: print every tensor's sha256; ``logits``: run both models on ``text``. Raises ``UserError`` for a
    checkpoint that cannot be read.
    """
    a, b = open_sides(paths)
    if logits and dist.get_world_size() > 1:
        raise UserError(
            "--logits", f"in a world of {dist.get_world_size()}", "runs in one process; start without torchrun"
        )
    first = dist.get_rank() == 0
    if first:
        print(f"A: {a}\nB: {b}", flush=True)
    reports = compare_tensors(a, b)
    differences, notes = compare_configs(a, b)
    if first:
        _print(reports, differences, notes, hashes)
    equal = not differences and all(report.problem is None for report in reports)
    if logits:
        found = compare_logits(a.hf, b.hf, text)
        print(found)
        equal = equal and found.equal
    return 0 if equal else 1


def _print(reports: list[TensorReport], differences: list[str], notes: list[str], hashes: bool) -> None:
    different = [report for report in reports if report.problem is not None]
    for report in reports:
        if hashes:
            both = report.digest_a if report.digest_a == report.digest_b else f"{report.digest_a} {report.digest_b}"
            print(f"{both}  {report.name}")
    for report in different:
        print(f"{report.name}: {report.problem}")
    for line in differences:
        print(line)
    for line in notes:
        print(f"note: {line}")
    digest = _digest(reports)
    if not different:
        print(f"all {len(reports)} tensors are bitwise equal (sha256 {digest})", flush=True)
    else:
        print(f"{len(different)} of {len(reports)} tensors differ", flush=True)


def _digest(reports: list[TensorReport]) -> str:
    """One hash of all tensors of A, to compare checkpoints on different machines."""
    whole = hashlib.sha256()
    for report in reports:
        whole.update(f"{report.name} {report.digest_a}\n".encode())
    return whole.hexdigest()
