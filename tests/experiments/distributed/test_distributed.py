"""Training over several processes: that of the program itself, and what it tells when something is wrong."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.distributed import train
from experiments.distributed.processes import free_port, run_together
from experiments.program.refusal import Refused

ROOT = Path(__file__).parents[3]


def program(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.distributed", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--processes=2", "--updates=3", "--batch=8"],
        pytest.param(["--processes=2", "--devices=2"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_gradient_of_one(arguments):
    done = program(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert float(re.search(r"relative difference (\S+),", done.stdout).group(1)) < train.SAME
    if len(losses) > 3:  # those of a whole training
        assert losses[-1] < 0.3 < losses[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes=0"], "--processes must be at least 1; seen 0"),
        (["--batch=7"], "--batch=7 examples do not divide over --processes=2"),
        (["--coordinator=host:1"], "--coordinator and --process-id belong together"),
        (["--coordinator=host", "--process-id=0"], "--coordinator must be host:port; seen 'host'"),
        (["--coordinator=host:1", "--process-id=2"], "--process-id must be 0 to 1; seen 2"),
        (["--batch=6", "--devices=2"], "--batch=6 examples do not divide over --processes=2 with --devices=2"),
    ],
)
def test_what_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(arguments)
    assert words in capsys.readouterr().err


def test_a_port_in_use_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match="2"):
            train.main([f"--port={port}"])
        assert f"Port {port} of this machine cannot be used" in capsys.readouterr().err
        with pytest.raises(Refused):
            free_port(port)
    assert free_port(None) > 0


def test_where_one_process_dies_the_others_end_and_it_is_told(capfd):
    dies = [sys.executable, "-c", "import sys; print('out of memory', file=sys.stderr); sys.exit(3)"]
    waits = [sys.executable, "-c", "import time; time.sleep(600)"]
    start = time.monotonic()
    assert run_together([waits, dies], os.environ) == 3
    assert time.monotonic() - start < 60
    told = capfd.readouterr().out
    assert "out of memory" in told
    assert "process 1 of 2 ended with status 3; the others were ended too" in told
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    assert run_together([killed, waits], os.environ) == -9
    assert "process 0 of 2 was ended by signal 9" in capfd.readouterr().out


def test_a_process_that_finds_no_others_says_what_to_do(capsys):
    arguments = [f"--coordinator=127.0.0.1:{free_port(None)}", "--process-id=1", "--timeout=1"]
    assert train.main(arguments) == 1
    told = capsys.readouterr().err
    assert "error: process 1 waited 1 seconds for 1 others: nobody listens at 127.0.0.1" in told
    assert "each with its own --process-id" in told
