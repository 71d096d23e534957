"""A process that is told to stop: before training it leaves in order with status 3, in training it is only noted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import hashlib, signal, sys, time
from flm_megatron.distributed import signals
signals.UNWIND_S = 0.3
def ready():
    print("ready", flush=True)
"""
WAITS = """
with signals.stop_before_training("stopped early"):
    try:
        ready()
        time.sleep(60)
    finally:
        print("left in order", flush=True)
"""
STUCK = """
with signals.stop_before_training("stopped early"):
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # a library call that Python's handlers cannot interrupt
"""
TRAINS = """
with signals.stop_before_training(), signals.stop_on_signal() as stop:
    ready()
    while not stop.asked:
        time.sleep(0.01)
    time.sleep(0.5)
print("saved", flush=True)
"""
TWICE = """
with signals.stop_before_training():
    try:
        ready()
        time.sleep(60)
    finally:
        signal.raise_signal(signal.SIGTERM)
        print("left in order", flush=True)
"""
ENDED = """
with signals.stop_before_training("stopped early"):
    signals.training_ended(0)
    ready()
    while not signals.told_to_stop():
        time.sleep(0.01)
    print("left in order", flush=True)
"""
ENDED_STUCK = """
with signals.stop_before_training("stopped early"):
    signals.training_ended(3, "saved")
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def signalled(script: str, number: int, folder: Path) -> tuple[int, str, str]:
    """Status, further output and errors of a script that gets a signal when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(folder / "word.json")},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    return process.returncode, out, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_training_what_is_open_is_left_in_order(number: int, tmp_path: Path) -> None:
    assert signalled(WAITS, number, tmp_path) == (3, "left in order\n", "")


def test_a_second_signal_does_not_disturb_leaving(tmp_path: Path) -> None:
    assert signalled(TWICE, signal.SIGTERM, tmp_path) == (3, "left in order\n", "")


def test_a_process_stuck_in_a_library_ends_all_the_same_and_leaves_word(tmp_path: Path) -> None:
    assert signalled(STUCK, signal.SIGTERM, tmp_path) == (3, "", "")
    message = json.loads((tmp_path / "word.json").read_text())["message"]
    assert (message["message"], message["errorCode"]) == ("stopped early", 3)


def test_in_training_a_signal_is_noted_and_ends_nothing(tmp_path: Path) -> None:
    assert signalled(TRAINS, signal.SIGTERM, tmp_path) == (0, "saved\n", "")


def test_after_training_a_signal_changes_neither_status_nor_words(tmp_path: Path) -> None:
    """A scheduler sends its signal again to a run that has saved because of the first."""
    assert signalled(ENDED, signal.SIGTERM, tmp_path) == (0, "left in order\n", "")
    assert not (tmp_path / "word.json").exists()
    assert signalled(ENDED_STUCK, signal.SIGTERM, tmp_path) == (3, "", "")
    message = json.loads((tmp_path / "word.json").read_text())["message"]
    assert (message["message"], message["errorCode"]) == ("saved", 3)
