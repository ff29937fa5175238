"""Signals end a command with one sentence and a defined exit code, and no process outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imprompt import training
from imprompt.cli import launch, main
from imprompt.utils.signals import Interrupted, StopRequest, explain_interrupt, handle_signals, raise_on_signals

SENTENCES = {
    signal.SIGINT: (130, "imprompt: interrupted\n"),
    signal.SIGTERM: (143, "imprompt: ended by SIGTERM\n"),
    signal.SIGHUP: (129, "imprompt: ended by SIGHUP\n"),
}
TRAIN = [
    "train", "--data", "mini:16", "--max-train-steps", "6", "--train-batch-size", "2", "--num-validation-images", "0", "--no-sanity-check",
]  # fmt: skip


@pytest.mark.parametrize("signum", SENTENCES)
def test_while_modules_are_imported(signum):
    """The signal is sent by the import of the command line, which is the first that takes time."""
    code = f"""
import os, sys, imprompt.__main__
class Finder:
    def find_spec(self, name, *_):
        if name == "cyclopts":
            os.kill(os.getpid(), {signum:d})
sys.meta_path.insert(0, Finder())
sys.exit(imprompt.__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == SENTENCES[signum]


@pytest.mark.parametrize("signum", SENTENCES)
def test_training_saves_its_state_and_the_same_command_continues(tmp_path, capsys, monkeypatch, signum):
    """The signal comes while the second step is logged."""
    log_steps, command = training.log_steps, [*TRAIN, "--output-dir", str(tmp_path / "run")]

    def log_and_signal(config, steps):
        for step in log_steps(config, steps):
            if step.index == 2:
                os.kill(os.getpid(), signum)
            yield step

    monkeypatch.setattr("imprompt.training.log_steps", log_and_signal)
    assert main(command) == 128 + signum
    sentence = SENTENCES[signum][1].rstrip()
    assert f"{sentence}; the state of step 3 is saved in {tmp_path / 'run'}, and the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0
    assert "resuming from step 3" in capsys.readouterr().err
    assert main(command) == 0
    assert "already complete: 6 of 6 steps" in capsys.readouterr().err


def test_the_second_signal_ends_at_once():
    stop = StopRequest()
    with stop.requests():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.signum == signal.SIGTERM
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_signal_that_is_ignored_stays_so():
    before = {signum: signal.getsignal(signum) for signum in SENTENCES}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise_on_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        with handle_signals(lambda signum, frame: None):
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Interrupted) as error, explain_interrupt("the rest is kept"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert (error.value.signum, error.value.text) == (signal.SIGTERM, "the rest is kept")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_launcher_passes_a_signal_on_and_kills_those_that_do_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SECONDS_TO_END", 1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    with launch._running() as group:
        for rank in range(2):
            group.processes.append(subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, process_group=0))
            assert group.processes[rank].stdout.readline() == b"ready\n"
            group.processes[rank].stdout.close()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert group.wait() == [-signal.SIGKILL, -signal.SIGKILL] and group.signals == [signal.SIGTERM] * 2
    with launch._running() as group:
        group.processes.append(subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE))
        group.processes[0].stdout.readline()
        group.processes[0].stdout.close()
        pid = group.processes[0].pid
    assert not is_running(pid)


@pytest.mark.parametrize("command", [["train"], ["encode", "mini"]])
@pytest.mark.parametrize(("number", "message"), [("1000000000000", "expected at most 1024, received"), ("1000", "expected at most ")])
def test_more_processes_than_the_machine_can_use_are_refused(tmp_path, capsys, monkeypatch, command, number, message):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert main([*command, "--num-processes", number, "--output-dir", str(tmp_path)]) == 2
    assert f"imprompt: num_processes: {message}" in capsys.readouterr().err
