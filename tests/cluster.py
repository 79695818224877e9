"""A cluster on one machine: stand-ins for the commands of Slurm that a script uses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SRUN = """\
#!{python}
# Starts the command once for each node, passes SIGTERM on to every task as Slurm does, and ends
# with the highest status.
import os, signal, subprocess, sys, time
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
tasks = [
    subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(i)}}) for i in range(nodes)
]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
with open(os.environ["STEP"], "w") as file:
    file.write(str(os.getpid()))
sys.exit(max(task.wait() % 256 for task in tasks))
"""
_SCONTROL = """\
#!/bin/bash
case "$1 $2" in
  "show hostnames") printf '127.0.0.1\\n127.0.0.1\\n' ;;
  requeue*) echo "$2" >> "$QUEUE" ;;
  *) exit 1 ;;
esac
"""


@dataclass(slots=True)
class Cluster:
    """Runs scripts for `sbatch` in a folder."""

    root: Path
    first: int = field(default_factory=lambda: 10 * (os.getpid() % 1900))
    """The number of a job, from which its port follows: other tests may run at the same time."""

    def __post_init__(self) -> None:
        for name, text in (("srun", _SRUN.format(python=sys.executable)), ("scontrol", _SCONTROL)):
            path = self.root / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def start(self, script: str, task: int = 0, **more: str) -> subprocess.Popen[str]:
        """Start a job with the nodes that the script asks for; `task` is its place in an array."""
        number = self.first + task
        text = (self.root / script).read_text(encoding="utf-8")
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
        step = self.root / f"step-{number}"
        step.unlink(missing_ok=True)
        names = {
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NUM_NODES": asked["nodes"],
            "SLURM_JOB_NODELIST": "node[1-2]",
            "STEP": str(step),
            "QUEUE": str(self.root / "queue"),
            "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        return subprocess.Popen(
            ["bash", script],
            cwd=self.root,
            env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | names | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stopped(self, job: subprocess.Popen[str], sign: Path) -> str:
        """Send SIGTERM to the tasks of a job once a file exists; returns what the job wrote."""
        deadline = time.monotonic() + 120
        while not sign.exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(int((self.root / f"step-{self.first}").read_text()), signal.SIGTERM)
        return job.communicate(timeout=120)[0]

    @property
    def queue(self) -> list[str]:
        """Jobs that went back into the queue."""
        path = self.root / "queue"
        return path.read_text().split() if path.exists() else []
