"""Training in several processes: they take the steps of one process with all their batches, and resume after they are killed.

Slow: about 25 interpreter starts (one each for two processes and for a kill), of which ten are the kills of one test.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from safetensors.torch import load_file

import imprompt

SCRIPT = """
import sys, json
from imprompt.config import TrainConfig
from imprompt.training import train_adapter
for step in train_adapter(TrainConfig.from_options(**json.loads(sys.argv[1]))):
    print(json.dumps([step.index, step.loss, step.grad_norm]), flush=True)
"""
OPTIONS = {
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "optimizer": "adamw",  # Muon orthogonalizes in bfloat16, which amplifies differences in the last digit
    "lr_warmup_steps": 2,
    "ema_decay": 0.0,
    "lr_scheduler": "constant",
    "num_validation_images": 0,
    "sanity_check": False,
    "mixed_precision": "float32",
    "device": "cpu",
}
TIMEOUT = 300  # seconds


def start_process(options, rank=0, num_processes=1, port=0):
    """Start one process of a training; it prints index, loss and gradient norm of each step."""
    distributed = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_processes,
        "LOCAL_WORLD_SIZE": num_processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    env |= {name: str(value) for name, value in distributed.items()} if num_processes > 1 else {}
    command = [sys.executable, "-c", SCRIPT, json.dumps(OPTIONS | options)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(processes):
    """The steps that the first process has printed when all have ended."""
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    assert all(process.returncode == 0 for process in processes), [err[-3000:] for _, err in outputs]
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("[")]


def train_alone(**options):
    return wait_for_steps([start_process(options)])


def train_in_pair(free_port, **options):
    return wait_for_steps([start_process(options, rank, 2, free_port) for rank in (0, 1)])


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def extensions_dir(request, monkeypatch):
    """DeepSpeed compiles an operator: into a cache of this checkout, kept between runs, instead of the one in the home folder."""
    folder = request.config.cache.mkdir(f"torch_extensions-{version('torch')}-{sys.implementation.cache_tag}")
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > TIMEOUT:  # its process was killed, and every other one would wait forever
            lock.unlink(missing_ok=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path, free_port):
    one = train_alone(train_batch_size=4, max_train_steps=50, output_dir=str(tmp_path / "one"))
    two = train_in_pair(free_port, max_train_steps=50, output_dir=str(tmp_path / "two"))
    assert len(one) == len(two) == 50
    assert [loss for _, loss, _ in two] == pytest.approx([loss for _, loss, _ in one], rel=1e-5)
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    # The division of AdamW makes single weights differ by 1.1e-5 on some CPUs.
    assert all((a[key] - b[key]).norm() < 1e-5 * b[key].norm() for key in a)


def test_zero_2_runs_resumes_and_writes_a_file_that_loads(tmp_path, free_port, extensions_dir):
    """Two processes on the CPU, in float32: the losses of plain data parallelism, with the optimizer state in two parts."""
    pytest.importorskip("deepspeed")
    plain = train_in_pair(free_port, max_train_steps=4, output_dir=str(tmp_path / "plain"))
    options = {"deepspeed": True, "checkpointing_steps": 2}
    zero = train_in_pair(free_port, **options, max_train_steps=4, output_dir=str(tmp_path / "zero"))
    assert [loss for _, loss, _ in zero] == pytest.approx([loss for _, loss, _ in plain], rel=1e-4)
    assert [norm for _, _, norm in zero] == pytest.approx([norm for _, _, norm in plain], rel=1e-3)
    states = tmp_path / "zero" / "state"
    assert len(list((states / "step-4" / "pytorch_model").glob("*zero_pp_rank_*_optim_states.pt"))) == 2

    resumed = train_in_pair(free_port, **options, max_train_steps=6, output_dir=str(tmp_path / "zero"))
    assert [index for index, _, _ in resumed] == [5, 6]
    complete = train_in_pair(free_port, **options, max_train_steps=6, output_dir=str(tmp_path / "complete"))
    assert [loss for _, loss, _ in resumed] == pytest.approx([loss for _, loss, _ in complete[4:]], rel=1e-5)
    assert imprompt.load(tmp_path / "zero" / "adapter.safetensors").spec.adapter_type == "base"


def test_a_run_that_is_killed_at_ten_random_moments_ends_with_the_same_weights(tmp_path):
    """No file is ever unreadable, and the weights are the same to the bit."""
    options = {"max_train_steps": 120, "checkpointing_steps": 3, "ema_decay": 0.9}
    train_alone(**options, output_dir=str(tmp_path / "complete"))
    rng, kills = random.Random(0), 0
    while kills < 10:
        process = start_process(options | {"output_dir": str(tmp_path / "killed")})
        for _ in range(rng.randint(1, 8)):
            line = process.stdout.readline()  # after each step
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += bool(line)
        assert line, "the run ended before it was killed often enough"
        for path in (tmp_path / "killed").glob("*.safetensors"):
            load_file(path)
    train_alone(**options, output_dir=str(tmp_path / "killed"))
    assert kills == 10
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("complete", "killed"))
    assert all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize("command", ["train", "encode"])
def test_an_error_is_one_sentence_however_many_processes_meet_it(tmp_path, command):
    arguments = [sys.executable, "-m", "imprompt", command, "--num-processes", "2"]
    arguments += ["--data", str(tmp_path / "no")] if command == "train" else [str(tmp_path / "no"), str(tmp_path / "out")]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("imprompt: no data at") and run.stderr.count("\n") == 1
