"""A real Slurm cluster of two virtual nodes on this machine, for the tests in this directory.

python tests/slurm/cluster.py start     # needs root and: apt-get install --no-install-recommends slurm-wlm munge
python tests/slurm/cluster.py stop

munged, slurmctld and one slurmd a node, all on the loopback interface, with their files under DIRECTORY and the nodes'
names in /etc/hosts while it runs. Scheduling, requeue, signals and node failures are real; what is declared (8 GPUs and
16 CPUs a node) is not, and nothing is confined. /etc/slurm is neither read nor written, other clusters are not touched.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

DIRECTORY = Path("/tmp/g2r-slurm-tests")
CONF = DIRECTORY / "slurm.conf"
NODES = ("g2r-n1", "g2r-n2")
GPUS, CPUS, MEMORY_MB = 8, 16, 200_000
FIRST_PORT = 26800  # slurmctld's; the nodes have the ones after it
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
HOSTS, HOSTS_MARK = Path("/etc/hosts"), "# g2r-slurm-tests"
PATIENCE = 120.0  # seconds
ENVIRONMENT = {**os.environ, "SLURM_CONF": str(CONF)}


def slurm_conf() -> str:
    """``slurm.conf``: quick to react, no accounting, no confinement, everything on loopback."""
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={FIRST_PORT + 1 + i} CPUs={CPUS} "
        f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
        for i, name in enumerate(NODES)
    )
    return f"""ClusterName=g2rtests
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmUser=root
SlurmctldPort={FIRST_PORT}
SlurmctldPidFile={DIRECTORY}/slurmctld.pid
SlurmdPidFile={DIRECTORY}/slurmd.%n.pid
StateSaveLocation={DIRECTORY}/state
SlurmdSpoolDir={DIRECTORY}/spool.%n
AuthType=auth/munge
# a requeued job waits until the credentials of its last attempt have expired (120 s by default)
AuthInfo=socket={DIRECTORY}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# believe what is declared below, not the hardware
SlurmdParameters=config_overrides
GresTypes=gpu
EnforcePartLimits=ALL
DefMemPerCPU=1000
ReturnToService=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
KillWait=30
MinJobAge=3600
# an answer that is late on a busy machine is not an answer lost: what is sent again hits the next attempt
MessageTimeout=100
SlurmdTimeout=60
{nodes}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=1-00:00:00 DefaultTime=60 State=UP
"""


def start() -> None:
    """Start the cluster and prove it with one step on all nodes. Raises ``SystemExit`` with the reason it cannot."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        raise SystemExit(f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge")
    if os.geteuid() != 0:
        raise SystemExit("start it as root: slurmd runs jobs, and the nodes' names go into /etc/hosts")
    if is_up():
        raise SystemExit(f"it is up already ({DIRECTORY}); python {__file__} stop")
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    (DIRECTORY / "state").mkdir(parents=True)
    CONF.write_text(slurm_conf())
    write_hosts([f"127.0.0.1 {name} {HOSTS_MARK}" for name in NODES])
    declare_gpus()
    start_munge()
    launch("slurmctld", ["slurmctld", "-D", "-c", "-f", str(CONF)])
    for name in NODES:
        (DIRECTORY / f"spool.{name}").mkdir()
        launch_node(name)
    prove()


def declare_gpus() -> None:
    """``gres.conf`` with device files that are copies of /dev/null, or plain files where mknod is not allowed."""
    for number in range(GPUS):
        device = DIRECTORY / f"gpu{number}"
        try:
            os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            device.touch()
    lines = [f"NodeName={name} Name=gpu File={DIRECTORY}/gpu[0-{GPUS - 1}]\n" for name in NODES]
    (DIRECTORY / "gres.conf").write_text("".join(lines))


def start_munge() -> None:
    key = DIRECTORY / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    names = (("socket", "munge.socket"), ("key-file", "munge.key"), ("pid-file", "munged.pid.own"))
    files = [f"--{option}={DIRECTORY / name}" for option, name in (*names, ("log-file", "munged.log.own"))]
    launch("munged", ["munged", "--foreground", "--force", f"--seed-file={DIRECTORY}/munge.seed", *files])
    wait_until(lambda: (DIRECTORY / "munge.socket").exists(), "munged")


def launch_node(name: str) -> None:
    """A slurmd in a UTS namespace of its own, so that ``hostname`` says the node's name (where that is allowed)."""
    own_hostname = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
    allowed = subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0
    command = ["slurmd", "-D", "-N", name, "-f", str(CONF)]
    launch(f"slurmd.{name}", [*(own_hostname if allowed else []), *command])


def restart_node(name: str) -> None:
    """Kill the node's slurmd and start it anew."""
    pid = int((DIRECTORY / f"slurmd.{name}.started").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in processes(), f"{name} without its old slurmd")
    launch_node(name)


def launch(name: str, command: list[str]) -> None:
    """Start a daemon in a session of its own and note its pid."""
    with open(DIRECTORY / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    (DIRECTORY / f"{name}.started").write_text(str(process.pid))


def prove() -> None:
    """One step on every node; without it two daemons may share a port and still look idle."""
    try:
        wait_until(lambda: ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == list(NODES), "the nodes")
        command = ["srun", "--quiet", f"-N{len(NODES)}", "-t", "1", "true"]
        subprocess.run(command, env=ENVIRONMENT, check=True, timeout=PATIENCE)
    except (TimeoutError, subprocess.SubprocessError) as error:
        logs = "".join(f"== {log.name}\n{log.read_text()[-2000:]}\n" for log in sorted(DIRECTORY.glob("*.log")))
        stop()
        raise SystemExit(f"the cluster did not come up: {error}\n{logs}") from error


def stop() -> None:
    """Cancel all jobs, end the daemons that ``start`` started and what they left running, and remove all traces."""
    if is_up():
        ask("scancel", "--quiet", "--user=root")
        deadline = time.monotonic() + 10.0
        while ask("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.1)
    # a slurmd's orphans (a slurmstepd lives on when its slurmd was killed) are known by their environment
    for number in (signal.SIGTERM, signal.SIGKILL):
        found = processes()
        for pid in found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + 10.0
        while processes() and time.monotonic() < deadline:
            time.sleep(0.1)
    write_hosts([])
    shutil.rmtree(DIRECTORY, ignore_errors=True)


def processes() -> list[int]:
    """The cluster's living processes: its daemons, and the slurmstepds they started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name = (entry / "comm").read_text().strip()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if name in ("munged", "slurmctld", "slurmd", "slurmstepd") and f"SLURM_CONF={CONF}".encode() in environment:
            found.append(int(entry.name))
    return found


def is_up() -> bool:
    """The controller of this cluster answers."""
    if not CONF.exists() or shutil.which("scontrol") is None:
        return False
    return subprocess.run(["scontrol", "ping"], env=ENVIRONMENT, capture_output=True).returncode == 0


def ask(*command: str) -> str:
    """What a Slurm command prints. Raises ``RuntimeError`` with what it says when it fails."""
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout.strip()


def write_hosts(lines: list[str]) -> None:
    """Replace our lines in /etc/hosts (in place: it may be a bind mount)."""
    before = HOSTS.read_text().splitlines()
    kept = [line for line in before if not line.endswith(HOSTS_MARK)]
    if kept + lines != before:
        HOSTS.write_text("".join(f"{line}\n" for line in kept + lines))


def wait_until(happened, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if happened():
                return
        except RuntimeError:  # the controller does not answer yet
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} not ready after {PATIENCE:.0f} s")
        time.sleep(0.1)


if __name__ == "__main__":
    commands = {"start": start, "stop": stop}
    if sys.argv[1:] not in (["start"], ["stop"]):
        raise SystemExit(__doc__)
    commands[sys.argv[1]]()
