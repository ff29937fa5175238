"""Several processes: together they do what one does with their batches put together; killed, they go on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

SCRIPT = """
import sys, json
from imprompt.config import Train, build
from imprompt.training import train
choice = build(Train, json.loads(sys.argv[1]))
for step in train(choice):
    print(json.dumps([step.index, step.loss, step.norm]), flush=True)
"""
SETTINGS = {
    "batch": 2,
    "lr": 1e-3,
    "optimizer": "adamw",  # Muon orthogonalises in bfloat16, which makes more of a last digit
    "warmup": 2,
    "ema": 0.0,
    "schedule": "constant",
    "validation": 0,
    "preflight": False,
    "precision": "float32",
    "device": "cpu",
}


def start(choices, rank=0, ranks=1, port=0):
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | ({k: str(v) for k, v in places.items()} if ranks > 1 else {})
    command = [sys.executable, "-c", SCRIPT, json.dumps(SETTINGS | choices)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes):
    out = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), [err[-3000:] for _, err in out]
    return [json.loads(line) for line in out[0][0].splitlines() if line.startswith("[")]


def pair(free_port, **choices):
    return finish([start(choices, rank, 2, free_port) for rank in (0, 1)])


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_make_the_steps_that_one_makes_with_twice_the_batch(tmp_path, free_port):
    one = finish([start({"batch": 4, "steps": 50, "out": str(tmp_path / "one")})])
    two = pair(free_port, steps=50, out=str(tmp_path / "two"))
    assert len(one) == len(two) == 50
    assert [loss for _, loss, _ in two] == pytest.approx([loss for _, loss, _ in one], rel=1e-5)
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert all((a[key] - b[key]).norm() < 1e-5 * b[key].norm() for key in a)  # of single weights AdamW's division makes 1.1e-5 on some CPUs


def test_zero_2_runs_resumes_and_writes_a_file_that_loads(tmp_path, free_port):
    """Two processes on the CPU, in float32: the losses of plain data parallelism, the optimiser's state in two parts."""
    pytest.importorskip("deepspeed")
    plain = pair(free_port, steps=4, out=str(tmp_path / "plain"))
    choices = {"steps": 4, "deepspeed": True, "save_every": 2, "out": str(tmp_path / "zero")}
    zero = pair(free_port, **choices)
    assert [loss for _, loss, _ in zero] == pytest.approx([loss for _, loss, _ in plain], rel=1e-4)
    assert [norm for _, _, norm in zero] == pytest.approx([norm for _, _, norm in plain], rel=1e-3)
    states = tmp_path / "zero" / "state"
    assert len(list((states / "step-4" / "pytorch_model").glob("*zero_pp_rank_*_optim_states.pt"))) == 2

    longer = pair(free_port, **choices | {"steps": 6})
    assert [index for index, _, _ in longer] == [5, 6]
    whole = pair(free_port, **choices | {"steps": 6, "out": str(tmp_path / "whole")})
    assert [loss for _, loss, _ in longer] == pytest.approx([loss for _, loss, _ in whole[4:]], rel=1e-5)

    import imprompt

    assert imprompt.load(tmp_path / "zero" / "adapter.safetensors").spec.kind == "global"


def test_killed_at_ten_random_moments_the_run_ends_as_if_it_had_not_been(tmp_path):
    """No state is ever unreadable, and the weights are the same to the bit."""
    choices = {"steps": 120, "save_every": 3, "ema": 0.9}
    finish([start(choices | {"out": str(tmp_path / "whole")})])
    rng, killed = random.Random(0), 0
    while killed < 10:
        process = start(choices | {"out": str(tmp_path / "killed")})
        for _ in range(rng.randint(1, 8)):
            line = process.stdout.readline()  # a step is done
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += bool(line)
        assert line, "the run ended before it was killed often enough"
        for path in (tmp_path / "killed").glob("*.safetensors"):
            load_file(path)
    finish([start(choices | {"out": str(tmp_path / "killed")})])
    assert killed == 10
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "killed"))
    assert all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize("verb", ["train", "encode"])
def test_an_error_is_one_sentence_however_many_processes_meet_it(tmp_path, verb):
    command = [sys.executable, "-m", "imprompt", verb, "--processes", "2"]
    command += ["--data", str(tmp_path / "no")] if verb == "train" else [str(tmp_path / "no"), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("imprompt: no data at") and run.stderr.count("\n") == 1
