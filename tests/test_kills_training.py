"""A run that is killed in any phase, and resumed, ends as one that nobody killed; so does a save. See the script."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import kills_training
import pytest
import torch
from kills_training import NAME, PHASES, same
from tiny import tiny
from training import rows

from hf_prune.train.resume import known_by

QUICK = ("cut", "boundary", "checkpoint", "save's exchange")
NOTHING = {"missing": 0, "unloadable": 0, "stale proof": 0, "a note is lost": 0, "leftovers": 0}


def script(*given):
    done = subprocess.run([sys.executable, kills_training.__file__, *map(str, given)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def table(out):
    found = json.loads((Path(out) / "table.json").read_text())
    assert {name: found[name] for name in NOTHING} == NOTHING
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("phases")
    script("phases", out, *QUICK)
    return torch.load(out / "found.pt")


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    out = tmp_path_factory.mktemp("phases")
    script("phases", out)
    return torch.load(out / "found.pt")


def check(found, phase):
    whole, killed = found[""], found[phase]
    assert killed["killed"] == -signal.SIGKILL
    assert killed["ended"] == whole["ended"] == 0
    assert same(whole, killed)  # the plan, and every weight bit by bit
    assert killed["left"] == []


@pytest.mark.parametrize("phase", QUICK)
def test_killed_in_a_phase_and_resumed_it_ends_the_same(quick, phase):
    check(quick, phase)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_every_phase_and_resumed_it_ends_the_same(every, phase):
    check(every, phase)


def test_data_made_again_in_another_process_are_known(quick):
    assert quick["data"] == known_by(rows(tiny(NAME)))


@pytest.mark.slow
def test_a_save_killed_at_each_of_its_calls_leaves_the_old_or_the_new(tmp_path):
    script("windows", tmp_path)
    assert table(tmp_path)["kills"] > 20


@pytest.mark.slow
def test_saves_killed_at_random_times_leave_the_old_or_the_new(tmp_path):
    script("saves", tmp_path, 70)
    table(tmp_path)


@pytest.mark.slow
def test_runs_killed_at_random_times_end_the_same(tmp_path):
    script("training", tmp_path, 70)
    found = table(tmp_path)
    assert (found["ended otherwise"], found.get("not resumed", 0), found["failed by itself"]) == (0, 0, 0)
    assert found["complete checkpoints"] == found["of which open"] > 0
