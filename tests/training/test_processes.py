"""Training in several processes: they take the steps of one process with all their batches, and resume after they are killed.

All trainings are forked from one process that has imported everything (fixture fork_server).
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

import pytest
from safetensors.torch import load_file

import imprompt
from imprompt.config import TrainConfig
from imprompt.training import train_adapter
from imprompt.training.state_files import read_state_file

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


def report_steps(connection, options, distributed):
    """In a process of its own: train, and send index, loss and gradient norm of each step; at last None, or the error."""
    os.environ.update(distributed, TQDM_DISABLE="1")
    try:
        for step in train_adapter(TrainConfig.from_options(**options)):
            connection.send([step.index, step.loss, step.grad_norm])
        connection.send(None)
    except BaseException:
        connection.send(traceback.format_exc())


@pytest.fixture(scope="module")
def start_process(fork_server):
    """A function that starts one process of a training and returns it with the connection to its steps."""

    def start(options, rank=0, num_processes=1, port=0):
        distributed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        distributed |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in distributed.items()} if num_processes > 1 else {}
        receiver, sender = fork_server.Pipe(duplex=False)
        process = fork_server.Process(target=report_steps, args=(sender, OPTIONS | options, environment), daemon=True)
        process.start()
        sender.close()
        return process, receiver

    return start


def wait_for_steps(processes):
    """The steps that the first process has sent when all have ended."""
    messages = []
    for _, connection in processes:
        messages.append([])
        while not messages[-1] or isinstance(messages[-1][-1], list):
            assert connection.poll(300), "no step for five minutes"
            messages[-1].append(connection.recv())
    errors = [sent[-1] for sent in messages if sent[-1]]
    assert not errors, errors
    for process, _ in processes:
        process.join(60)
    assert [process.exitcode for process, _ in processes] == [0] * len(processes)
    return messages[0][:-1]


@pytest.fixture(scope="module")
def train_alone(start_process):
    return lambda **options: wait_for_steps([start_process(options)])


@pytest.fixture(scope="module")
def train_in_pair(start_process):
    def train(**options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return wait_for_steps([start_process(options, rank, 2, port) for rank in (0, 1)])

    return train


@pytest.fixture(scope="module")
def pair(train_in_pair, tmp_path_factory):
    """Folder and steps of a training in two processes."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, train_in_pair(max_train_steps=30, output_dir=str(folder))


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(pair, tmp_path, train_alone):
    one, (folder, two) = train_alone(train_batch_size=4, max_train_steps=30, output_dir=str(tmp_path)), pair
    assert len(one) == len(two) == 30
    assert [loss for _, loss, _ in two] == pytest.approx([loss for _, loss, _ in one], rel=1e-5)
    a, b = (load_file(folder / "adapter.safetensors") for folder in (tmp_path, folder))
    # The division of AdamW makes single weights differ by 1.1e-5 on some CPUs.
    assert all((a[key] - b[key]).norm() < 1e-5 * b[key].norm() for key in a)


def test_zero_2_runs_resumes_and_writes_a_file_that_loads(pair, tmp_path, train_in_pair):
    """Two processes on the CPU, in float32: the losses of plain data parallelism, with the optimizer state in two parts."""
    pytest.importorskip("deepspeed")
    plain, options = pair[1], {"deepspeed": True, "checkpointing_steps": 2, "max_train_steps": 6, "output_dir": str(tmp_path)}
    complete = train_in_pair(**options)
    assert [loss for _, loss, _ in complete] == pytest.approx([loss for _, loss, _ in plain[:6]], rel=1e-4)
    assert [norm for _, _, norm in complete] == pytest.approx([norm for _, _, norm in plain[:6]], rel=1e-3)
    states = tmp_path / "state"
    parts = [read_state_file(states / "step-4" / f"rank-{rank}.safetensors")["sharded"] for rank in (0, 1)]
    sizes = [sum(weights.numel() for weights in part["weights"]) for part in parts]
    assert sizes[0] == sizes[1] and sum(sizes) < 1.01 * sum(t.numel() for t in load_file(tmp_path / "adapter.safetensors").values())

    shutil.rmtree(states / "step-6")  # as if killed before
    resumed = train_in_pair(**options)
    assert [index for index, _, _ in resumed] == [5, 6]
    assert [loss for _, loss, _ in resumed] == pytest.approx([loss for _, loss, _ in complete[4:]], rel=1e-5)
    assert imprompt.load(tmp_path / "adapter.safetensors").spec.adapter_type == "base"


def test_a_run_that_is_killed_at_ten_random_moments_ends_with_the_same_weights(tmp_path, start_process, train_alone):
    """No file is ever unreadable, and the weights are the same to the bit."""
    options = {"max_train_steps": 40, "checkpointing_steps": 2, "ema_decay": 0.9}
    start = time.monotonic()
    train_alone(**options, output_dir=str(tmp_path / "complete"))
    seconds_per_step = (time.monotonic() - start) / 40
    rng, folder = random.Random(0), tmp_path / "killed"
    for _ in range(10):
        process, connection = start_process(options | {"output_dir": str(folder)})
        steps = [connection.recv() for _ in range(rng.randint(1, 3))]
        time.sleep(rng.uniform(0, 2 * seconds_per_step))  # every second step writes a checkpoint
        process.kill()
        process.join()
        assert all(steps) and process.exitcode == -signal.SIGKILL, "the run ended before it was killed often enough"
        for path in folder.glob("*.safetensors"):
            load_file(path)
    train_alone(**options, output_dir=str(folder))
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("complete", "killed"))
    assert all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize("command", ["train", "encode"])
def test_an_error_is_one_sentence_however_many_processes_meet_it(tmp_path, command):
    arguments = [sys.executable, "-m", "imprompt", command, "--num-processes", "2"]
    arguments += ["--data", str(tmp_path / "no")] if command == "train" else [str(tmp_path / "no"), str(tmp_path / "out")]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("imprompt: no data at") and run.stderr.count("\n") == 1
