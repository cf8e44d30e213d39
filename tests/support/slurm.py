"""Slurm on this machine: a controller and two nodes, each with one processor and a device that counts as a GPU."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.free_port import free_port

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
HERE = all(shutil.which(name, path=PATH) for name in ("slurmctld", "slurmd", "sbatch"))

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1500 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1500 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    folder: Path
    env: dict[str, str]

    def __call__(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def job(self, id: str) -> dict[str, str]:
        """What `scontrol` shows about a job."""
        words = self("scontrol", "show", "job", "-dd", id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Runs the daemons. Raises `RuntimeError` if this Slurm does not run in this way.

    `folder` needs a short path: Slurm makes sockets in it, whose paths may have 107 bytes.
    """
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    ports = [free_port() for _ in range(3)]
    (folder / "state").mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONF.format(host=host, user=user, ports=ports, folder=folder))
    (folder / "gres.conf").write_text("NodeName=node[1-2] Name=gpu File=/dev/null\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY"))}
    found = Slurm(folder, {**env, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH})
    daemons = []
    try:
        with (folder / "daemons.log").open("w") as log:
            for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"]):
                daemons.append(subprocess.Popen(command, env=found.env, stdout=log, stderr=log, start_new_session=True))
        deadline = time.monotonic() + 120
        while (state := _states(found)) != ["idle", "idle"]:
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
                raise RuntimeError(f"{state}\n{found.log()}")
            time.sleep(0.2)
        yield found
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


def _states(found: Slurm) -> list[str]:
    try:
        return found("sinfo", "-h", "-N", "-o", "%T").split()
    except AssertionError:  # the controller does not answer yet
        return []
