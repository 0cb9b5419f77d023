"""Signals that wait until a block has ended, whatever it does, and what is there after it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minimti import signals
from minimti.signals import handled, held

ROOT = Path(__file__).resolve().parents[1]
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def test_a_signal_within_a_block_acts_after_it():
    handlers, done = [signal.getsignal(number) for number in STOPS], []
    with pytest.raises(KeyboardInterrupt):
        with held():
            with held():
                os.kill(os.getpid(), signal.SIGINT)
                done.append(1)
            done.append(2)
        done.append(3)
    assert done == [1, 2] and [signal.getsignal(number) for number in STOPS] == handlers


def test_the_message_of_an_error_within_a_block_is_not_lost_to_a_signal():
    handlers = [signal.getsignal(number) for number in STOPS]
    with pytest.raises(ValueError, match="the disk is full"), held():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("the disk is full")
    assert [signal.getsignal(number) for number in STOPS] == handlers


def test_ignored_signals_stay_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_an_interrupt_while_handlers_are_given_back_leaves_none_behind(monkeypatch, moment):
    handlers, install, given = [signal.getsignal(number) for number in STOPS], signal.signal, []

    def give_back(number, handler):
        install(number, handler)
        given.append(number)
        if len(given) == moment:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), held():
        monkeypatch.setattr(signal, "signal", give_back)
    monkeypatch.undo()
    assert [signal.getsignal(number) for number in STOPS] == handlers


def test_handlers_that_python_did_not_install_stay(monkeypatch):
    """They are None here, and could not be given back."""
    installed = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *about: installed.append(about))
    with handled(lambda *_: None):
        pass
    assert installed == []


def test_in_another_thread_a_block_is_all_there_is():
    done = []

    def work():
        with held() as check:
            check()
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_after_the_end_changes_neither_exit_code_nor_output(number):
    """Python gives signals their defaults back while it ends: then one would kill the program without a line."""
    code = f"""if True:
        import os, sys
        from minimti import cli, signals
        signals.install(signals.end)
        class Late:
            def __del__(self, kill=os.kill, me=os.getpid()):  # after Python has given signals back
                kill(me, {int(number)})
        sys.late = Late()
        cli.run(lambda: print("done"))
        """
    heed = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=heed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("program", ["evaluate", "pretrain", "bench"])
def test_a_signal_during_the_first_import_is_one_line(tmp_path, program):
    """A stand-in for PyTorch sends it."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    command = [sys.executable, "-m", f"minimti.{program}"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, f"{program}: error: interrupted\n")


def test_all_signals_that_stop_a_program_are_known():
    assert signals.STOPS == STOPS
