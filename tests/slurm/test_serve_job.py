"""``sbatch slurm/serve.sh``: the URL where others read it, credit for a client, a killed rank, and a drained end.

The script as it is, with the quickstart's judge, a rank on each of two virtual nodes. Leaves out NCCL and time limits.
"""

import httpx
import pytest
from cluster import ask
from jobs import PATIENCE, Job

from g2r_megatron.client import Judge
from service import QUICKSTART

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
KEY = "k" * 32


def test_serve_job(tmp_path):
    (tmp_path / "key").write_text(KEY)
    url_file = tmp_path / "serve.url"
    options = ["--judge.layout.tp=2"]
    job = Job("serve", options, tmp_path, "--nodes=2", CONFIG=str(QUICKSTART), KEY_FILE="key", PORT="0")
    job.wait(url_file.exists)
    url = url_file.read_text().strip()
    assert httpx.get(url + "/v1/models").status_code == 401
    with Judge(url, api_key=KEY, retry_seconds=PATIENCE) as judge:
        assert judge.model()["ranks"] == 2
        asked = dict(prompt="tired.", rubric=["advises rest", "advises slow turns"])
        before = judge.credit(["rest.", "try slow turns."], **asked)
        job.kill_rank(1)
        job.wait(lambda: httpx.get(url + "/healthz").status_code == 503)
        after = judge.credit(["rest.", "try slow turns."], **asked, mix=0.5)
        assert [one["token_rewards"] for one in after] == [one["token_rewards"] for one in before]
    ask("scancel", "--batch", "--signal=TERM", job.id)
    assert job.end() == "COMPLETED 0:0", job.text()
    assert not url_file.exists()
