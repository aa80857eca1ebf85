"""Signals at every moment of a program: the exit code, one line on stderr, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 30.0  # where it hangs
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
# Says at which moment it is, after what it has started, and waits there for a signal.
PROGRAM = """
import sys

from splitray.signals import cleaned_up, heed_signals

heed_signals()
import subprocess, threading, time, weakref

def here(*started):
    print(*started, flush=True)
    for _ in range(1000):
        time.sleep(0.01)

class Object:
    pass

moment = sys.argv[1]
if moment == "before":
    here()
from splitray.report.boundary import told_errors
from splitray.scratch import scratch_folder

try:
    with told_errors(), scratch_folder() as folder:
        child = subprocess.Popen(["sleep", "60"])
        try:
            if moment == "import":
                sys.argv = [str(folder), str(child.pid)]
                import slow_to_import
            elif moment == "callback":
                thing = Object()
                watched = weakref.ref(thing, lambda _: here(folder, child.pid))
                del thing
            here(folder, child.pid)
        finally:
            if moment == "cleanup":
                here("cleaning up")
            child.terminate()
            child.wait()
except BaseException as end:
    sys.exit(getattr(end, "exit_code", 99))
"""
SLOW = """
import sys
try:
    sys.modules["__main__"].here(*sys.argv)
except BaseException:
    raise ImportError("some libraries do that")
"""


def run(moment: str, folder: Path) -> subprocess.Popen[str]:
    (folder / "slow_to_import.py").write_text(SLOW)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, moment], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("number", CODES, ids=[s.name for s in CODES])
@pytest.mark.parametrize("moment", ["before", "import", "command", "callback", "cleanup"])
def test_a_signal_ends_the_program_and_all_that_it_started(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    with run(moment, tmp_path) as program:
        assert program.stdout is not None
        folder, _, child = program.stdout.readline().strip().rpartition(" ")
        program.send_signal(number)
        if moment == "cleanup":
            assert program.stdout.readline() == "cleaning up\n"
            program.send_signal(number)
        _, told = program.communicate(timeout=SOON_S)
    assert program.returncode == CODES[number], told
    what = "interrupted" if number == signal.SIGINT else "terminated"
    assert told == f"error: {what}; everything that was started has been stopped\n"
    if moment != "before":
        assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE
        assert not Path(folder).exists()


def test_a_program_that_is_to_be_spared_is_spared(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from splitray.signals import heed_signals; "
    code += "heed_signals(); signal.raise_signal(signal.SIGINT); print('here')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "here\n"
