"""A directory is replaced whole or not at all: whoever is killed where, whoever else writes, whatever the path is."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from children import forked, signal_of
from kills_saving import kills
from tiny import cut_tiny

from hf_prune import save_pretrained, verify
from hf_prune.checkpoint import directory as module
from hf_prune.checkpoint.directory import WORKSHOP, beside, clear, refuse_full, resolved

OLD, NEW = "an old save", "a new save"
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # a child forks, writes and dies
linux = pytest.mark.skipif(module.fcntl is None, reason="needs flock")


def write(target, text=NEW):
    with beside(resolved(target)) as new:
        (new / "half").write_text(text)
        (new / "sub").mkdir()
        (new / "sub/whole").write_text(text)


def content(target):
    return {path.name: path.read_text() for path in target.rglob("*") if path.is_file()}


def whole(text):
    return {"half": text, "whole": text}


def hidden(parent):
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


@pytest.fixture(params=[True, False], ids=["exchange", "two steps"])
def exchanges(request, monkeypatch):
    if request.param:
        pytest.importorskip("fcntl", reason="needs flock")
    else:
        monkeypatch.setattr(module, "exchange", lambda a, b: False)
    return request.param


@pytest.fixture(params=[OLD, None], ids=["over an old save", "where nothing is"])
def target(request, tmp_path):
    if request.param:
        write(tmp_path / "out", request.param)
    return tmp_path / "out"


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)


def after(real, times=1):
    """The call, and death behind its n-th time."""
    left = [times]

    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        left[0] -= 1
        return result if left[0] else die()

    return call


# --- what a kill leaves ----------------------------------------------------------------------------------------------


def test_this_system_exchanges_in_one_step(tmp_path):
    if os.uname().sysname != "Linux":
        pytest.skip("renameat2 is Linux's")
    write(tmp_path / "a", OLD)
    write(tmp_path / "b", NEW)
    assert module.exchange(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "a") == whole(NEW)
    assert content(tmp_path / "b") == whole(OLD)


WINDOWS = {  # where a writer is killed: module, name, at which call
    "before the workshop is locked": ("_locked", lambda real: die),
    "with an empty workshop": ("_is_there", after),
    "before the files are on disk": ("_sync", lambda real: die),
    "before the change": ("_put", lambda real: die),
    "after the change": ("_put", after),
    "before the old one is removed": ("_empty", lambda real: die),
}


@linux
@pytest.mark.parametrize("window", WINDOWS)
def test_a_kill_in_each_window_leaves_the_old_or_the_new(target, exchanges, window, monkeypatch):
    name, make = WINDOWS[window]
    there = target.exists()

    def run():
        monkeypatch.setattr(module, name, make(getattr(module, name)))
        write(target)

    assert signal_of(forked(run)) == signal.SIGKILL
    if window.startswith(("after", "before the old")):
        assert content(target) == whole(NEW)
    elif there:
        assert content(target) == whole(OLD)
    else:
        assert not target.exists()
    write(target.parent / "another")  # any save beside it
    assert hidden(target.parent) == []
    write(target)
    assert content(target) == whole(NEW)
    assert hidden(target.parent) == []


@linux
@pytest.mark.parametrize("recovery", ["a save beside it", "the same save", "verify", "clear"])
def test_a_kill_between_the_two_steps_is_put_right(tmp_path, monkeypatch, recovery):
    """Only where a system cannot exchange: the target is gone for a moment, and its writer dies in it."""
    target = tmp_path / "out"
    write(target, OLD)
    monkeypatch.setattr(module, "exchange", lambda a, b: False)

    def run():
        rename = type(target).rename
        monkeypatch.setattr(type(target), "rename", after(rename))
        write(target)

    assert signal_of(forked(run)) == signal.SIGKILL
    assert not target.exists()
    if recovery == "a save beside it":
        write(tmp_path / "another")
    elif recovery == "the same save":
        write(target)
    elif recovery == "verify":
        with pytest.raises(ValueError, match="never proven"):  # it is found again, and is no checkpoint
            verify(target)
    else:
        clear(tmp_path)
    assert content(target) == whole(NEW if recovery == "the same save" else OLD)
    assert hidden(tmp_path) == []


@linux
def test_the_leftovers_of_many_kills_are_gone_after_the_next_save(tmp_path, monkeypatch):
    def run(name):
        monkeypatch.setattr(module, "_sync", die)
        monkeypatch.setattr(module, "clear", lambda parent: None)  # which every save begins with
        write(tmp_path / name)

    for number in range(12):
        assert signal_of(forked(lambda number=number: run(f"out{number}"))) == signal.SIGKILL
    assert len(hidden(tmp_path)) == 12
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@linux
def test_a_living_writers_workshop_is_left_alone(tmp_path):
    ready, go = os.pipe(), os.pipe()

    def run():
        with beside(resolved(tmp_path / "slow")) as new:
            (new / "half").write_text(NEW)
            os.write(ready[1], b"1")
            os.read(go[0], 1)

    child = forked(run)
    os.read(ready[0], 1)
    write(tmp_path / "fast")
    assert len(hidden(tmp_path)) == 1
    with pytest.raises(FileExistsError, match=r"slow is being written by another process"):
        write(tmp_path / "slow", OLD)
    os.write(go[1], b"1")
    os.waitpid(child, 0)
    assert content(tmp_path / "slow") == {"half": NEW}
    assert hidden(tmp_path) == []


def test_two_threads_never_mix_their_files(tmp_path):
    target, errors = tmp_path / "out", []

    def run(text):
        for _ in range(20):
            try:
                write(target, text)
            except FileExistsError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=run, args=(text,)) for text in (OLD, NEW)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(target) in (whole(OLD), whole(NEW))
    assert all("is being written by another process or thread" in error for error in errors)
    assert hidden(tmp_path) == []


@linux
def test_two_processes_that_save_the_same_target(tmp_path):
    """Each either saves all of its own or is told; none breaks the other's."""
    target, children = tmp_path / "out", []
    for text in (OLD, NEW, "a third save"):
        child = os.fork()
        if child == 0:
            for _ in range(15):
                try:
                    write(target, text)
                except FileExistsError:
                    continue
                except BaseException:
                    os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert content(target) in (whole(OLD), whole(NEW), whole("a third save"))
    assert hidden(tmp_path) == []


@linux
def test_a_workshop_of_the_same_name_without_an_owner_is_no_hindrance(tmp_path):
    """Names tell nothing of who lives: what a dead process of the same id left is cleared, too."""
    workshop = module._workshop_of(tmp_path / "out")
    (workshop / "new").mkdir(parents=True)
    (workshop / "new/stale").write_text("stale")
    write(tmp_path / "out")
    assert content(tmp_path / "out") == whole(NEW)


def test_without_locks_nobodys_workshop_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    workshop = module._workshop_of(tmp_path / "other")
    workshop.mkdir()
    write(tmp_path / "out")
    assert workshop.exists()
    with pytest.raises(FileExistsError, match=rf"remove .*{WORKSHOP}"):
        write(tmp_path / "other")


# --- errors in the middle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("mine")])
def test_an_error_leaves_what_was_there(target, exchanges, error):
    there = target.exists()

    def run():
        with beside(resolved(target)) as new:
            (new / "half").write_text(NEW)
            raise error

    with pytest.raises(type(error)):
        run()
    assert content(target) == (whole(OLD) if there else {})
    assert target.exists() == there
    assert hidden(target.parent) == []


@pytest.mark.parametrize("name", ["_sync", "_sync_one", "_put"])
def test_a_disk_that_fails_at_the_end_leaves_what_was_there(target, exchanges, name, monkeypatch):
    there = target.exists()

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError, match="Input/output"):
        write(target)
    assert content(target) == (whole(OLD) if there else {})
    assert hidden(target.parent) == []


def test_a_second_step_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write(target, OLD)
    real, calls = type(target).rename, []

    def rename(self, goal):
        calls.append(goal)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(self, goal)

    monkeypatch.setattr(module, "exchange", lambda a, b: False)
    monkeypatch.setattr(type(target), "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        write(target)
    assert content(target) == whole(OLD)
    assert hidden(tmp_path) == []


def test_what_is_renamed_is_on_disk_before(target, exchanges, monkeypatch):
    """Every file and directory is flushed before the names change, and the parent after."""
    synced, real, put = [], module._sync_one, module._put
    monkeypatch.setattr(module, "_sync_one", lambda path: synced.append(path.name) or real(path))
    monkeypatch.setattr(module, "_put", lambda *args: synced.append("|") or put(*args))
    write(target)
    before, after = synced[: synced.index("|")], synced[synced.index("|") :]
    assert sorted(before) == ["half", "new", "sub", "whole"]
    assert after == ["|", target.parent.name]


def test_the_mode_of_a_directory_stays(tmp_path):
    write(tmp_path / "out", OLD)
    (tmp_path / "out").chmod(0o750)
    write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return cut_tiny("BertForSequenceClassification", "per_layer")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A working directory with a file, a full directory, and links to both and to nowhere."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").write_text("mine")
    (here / "full").mkdir()
    (here / "full/notes").write_text("mine")
    for name, goal in (("to_file", "file"), ("to_full", "full"), ("to_nowhere", "gone"), ("loop", "loop")):
        (here / name).symlink_to(goal)
    monkeypatch.chdir(here)
    return here


def tree(home):
    return {str(path.relative_to(home)): os.lstat(path).st_mode for path in sorted(home.rglob("*"))}


BAD_PATHS = [
    (None, TypeError, "A directory is a path, got NoneType"), (3, TypeError, "got int"),
    (b"out", TypeError, "got bytes"),
    (["out"], TypeError, "got list"), (True, TypeError, "got bool"),
    ("", ValueError, "'' is the current directory"), (".", ValueError, "is the current directory"),
    ("..", ValueError, "is the current directory or holds it"), ("/", ValueError, "is the current directory or holds"),
    ("full/..", ValueError, "is the current directory"), ("/proc", ValueError, "is a mount point"),
    ("a\0b", ValueError, "cannot be a path"), ("x" * 300, ValueError, "cannot be a path"),
    ("loop", FileExistsError, "is a file|cannot be"), ("file", FileExistsError, "is a file"),
    ("to_file", FileExistsError, "is a file"), ("file/below", FileExistsError, "is a file"),
    ("to_file/below/it", FileExistsError, "is a file"), ("/dev/null", FileExistsError, "is a file"),
]  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("path", "error", "match"), BAD_PATHS, ids=[repr(row[0])[:12] for row in BAD_PATHS])
def test_a_path_that_cannot_be_replaced_changes_nothing(places, model, path, error, match, overwrite):
    before = tree(places)
    with pytest.raises(error, match=match):
        save_pretrained(model, path, overwrite=overwrite)
    assert tree(places) == before
    assert (places / "file").read_text() == "mine"


@pytest.mark.parametrize("path", ["full", "full/", "./full", "to_full", "to_full/", "here"])
def test_a_directory_that_is_full_is_only_replaced_when_asked(places, path):
    (places / "here").symlink_to("to_full")
    with pytest.raises(FileExistsError, match=r"full exists and is not empty.*overwrite=True"):
        refuse_full(path, overwrite=False)
    write(refuse_full(path, overwrite=True))
    assert content(places / "full") == whole(NEW)
    assert (places / "to_full").is_symlink()


def test_a_link_stays_a_link(places, model):
    save_pretrained(model, "to_full", overwrite=True)
    assert (places / "to_full").is_symlink()
    assert verify("to_full") == verify("full") <= 1e-5
    assert not (places / "full/notes").exists()


def test_a_link_to_nowhere_leads_somewhere_afterwards(places):
    write("to_nowhere")
    assert (places / "to_nowhere").is_symlink()
    assert content(places / "gone") == whole(NEW)


def test_a_home_directory_is_meant(places, monkeypatch):
    monkeypatch.setenv("HOME", str(places / "full"))
    write("~/deep/out")
    assert content(places / "full/deep/out") == whole(NEW)
    assert not (places / "~").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_is_read_only(places):
    (places / "full").chmod(0o500)
    with pytest.raises(PermissionError, match="Nothing may be written in"):
        resolved("full/out")


def test_a_parent_that_is_read_only_is_said_before_a_save(places, model, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = tree(places)
    with pytest.raises(PermissionError, match=r"Nothing may be written in .*Choose another"):
        save_pretrained(model, "out")
    assert tree(places) == before


# --- random kills ----------------------------------------------------------------------------------------------------


def assert_nothing_is_lost(found):
    assert set(found["found"]) == {"old", "new", "nothing"}  # none unloadable, none with a stale proof
    assert found["missing though it was there"] == 0
    assert found["hidden after the next save"] == 0


@linux
@pytest.mark.parametrize("count", [5, pytest.param(70, marks=pytest.mark.slow)])
def test_random_kills_of_a_save_lose_nothing(tmp_path, count):
    assert_nothing_is_lost(kills(count, 0, tmp_path))
