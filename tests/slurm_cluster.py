"""A real SLURM with two nodes on this machine, of its own daemons, for the tests of slurm/.

    with Cluster() as cluster:
        job = cluster.submit("--nodes", "2", "job.sh")
        cluster.wait(job, "COMPLETED")

Needs root and Debian's slurm-wlm and munge. Both nodes are this machine, so they share its files
as the nodes of a cluster do. Jobs of the partition `high` pre-empt those of `low`.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from conftest import ROOT

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
# a short cred_expire also shortens the wait before a requeued job starts again
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/spool-%n
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the nodes are smaller than the machine
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
JobRequeue=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=2 RealMemory=4000
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "a SLURM of its own needs root"
    absent = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else None


def free_ports(count: int) -> int:
    """The first of so many consecutive ports that are free now."""
    for first in range(26_000, 32_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


class Cluster:
    """Runs while the `with` block does."""

    def __init__(self) -> None:
        # not pytest's tmp_path, which is too long for a socket, and too private for munged
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.root.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        port = free_ports(3)
        (self.root / "state").mkdir()
        conf = CONF.format(
            root=self.root, host=socket.gethostname(),
            controller_port=port, node_ports=f"{port + 1}-{port + 2}",
        )  # fmt: skip
        (self.root / "slurm.conf").write_text(conf)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
        options = [f"--{name}-file={self.root}/munge.{end}" for name, end in files.items()
                   if name != "socket"]  # fmt: skip
        subprocess.run(["munged", *options, f"--socket={self.root}/munge.socket"], check=True)
        try:
            self._daemon("slurmctld", "-i")
            for node in NODES:
                self.start_node(node)
            self._until(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D") == "2")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        with suppress(RuntimeError, AssertionError):
            self.call("scancel", "--user=root")
            self._until(lambda: self.call("squeue", "-h") == "")
        for pid_file in (*sorted(self.root.glob("slurm*.pid")), self.root / "munge.pid"):
            if pid_file.is_file():
                self._kill(pid_file, signal.SIGTERM)

    def _daemon(self, name: str, *options: str) -> None:
        subprocess.run([name, *options], env=self.environment, check=True)

    @staticmethod
    def _kill(pid_file: Path, number: int) -> None:
        with suppress(ProcessLookupError, ValueError):
            os.kill(int(pid_file.read_text()), number)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """kill -9 of its daemon and of all that it started: to the others the node is gone."""
        self._kill(self.root / f"slurmd-{node}.pid", signal.SIGKILL)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node:
                    for one in (process.parent(), process):  # slurmstepd, and the task or script
                        if one.name().startswith(("slurmstepd", "bash", "python")):
                            one.kill()

    def call(self, *command: str) -> str:
        """What a SLURM command prints."""
        result = subprocess.run(
            command,
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"{command}: {result.stderr}")
        return result.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """Calls sbatch; returns the job's number."""
        return self.call("sbatch", "--parsable", *arguments)

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState, Restarts or ExitCode."""
        found = re.search(rf"\b{name}=(\S*)", self.call("scontrol", "show", "job", job))
        return found[1] if found else ""

    def wait(self, job: str, state: str, seconds: float = 300) -> None:
        """Until the job is in this state; AssertionError where it ends in another, or too late."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._until(
            lambda: self.field(job, "JobState") in (state, *(ended if state in ended else ())),
            seconds,
        )
        found = self.field(job, "JobState")
        assert found == state, f"job {job} is {found}, not {state}"

    @staticmethod
    def _until(condition, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not so within {seconds} s"
            time.sleep(0.5)
