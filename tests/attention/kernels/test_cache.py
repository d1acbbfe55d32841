"""What the cache holds is whole, ours and closed to others, or it is not used."""

import errno
import fcntl
import hashlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_longformer.attention.kernels import cache
from adaptive_longformer.attention.kernels.cache import (
    KernelsUnavailableError,
    find,
    find_or_make,
)

CONTENT = bytes(range(256)) * 32
STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def builds_are_allowed(monkeypatch):
    monkeypatch.delenv("ADAPTIVE_LONGFORMER_KERNELS", raising=False)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "entry"


def make(folder, content=CONTENT):
    (folder / "kernels.so").write_bytes(content)
    return "kernels.so"


def content_of(folder, make=make):
    with find_or_make(folder, make).file as file:
        return file.read()


def refuse_to_make(folder):
    raise AssertionError("made again")


def test_what_was_made_is_recorded_and_closed_to_others_whatever_the_umask(folder):
    before = os.umask(0)
    try:
        assert content_of(folder) == CONTENT
    finally:
        os.umask(before)
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert (folder / "done").read_text() == f"{digest} {len(CONTENT)} kernels.so\n"
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"done": 0o600, "kernels.so": 0o600}
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    assert content_of(folder, refuse_to_make) == CONTENT


def test_the_record_is_written_when_the_file_is_on_the_disk(folder, monkeypatch):
    """And the folder gets its name when the record is."""
    synced, original = [], os.fsync

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        has_record = (path.parent / "done").exists()
        synced.append((path.name.partition("-")[0], has_record, folder.exists()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    content_of(folder)
    assert synced == [
        ("kernels.so", False, False),
        ("done", True, False),
        ("entry.unfinished", False, False),
        ("cache", False, True),
    ]


def cut(length):
    return lambda path: os.truncate(path, length)


def flip(path):
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(byte ^ 0xFF for byte in content[100:140])
    path.write_bytes(content)


def replace_by_link(path):
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path, 0o600)


def replace_by_folder(path):
    path.unlink()
    path.mkdir(mode=0o700)


def write(content):
    return lambda path: path.write_bytes(content)


def elsewhere(name):
    """A record that would be right if it did not name a path."""

    def change(path):
        target = path.parents[2] / "elsewhere"
        target.write_bytes(CONTENT)
        target.chmod(0o600)
        digest = hashlib.sha256(CONTENT).hexdigest()
        path.write_text(f"{digest} {len(CONTENT)} {name or target}\n")

    return change


DAMAGE = {
    **{f"cut to {length}": ("kernels.so", cut(length)) for length in (0, 1, 4096, 8191)},
    "longer": ("kernels.so", cut(8193)),
    "flipped": ("kernels.so", flip),
    "missing": ("kernels.so", Path.unlink),
    "link": ("kernels.so", replace_by_link),
    "pipe": ("kernels.so", replace_by_pipe),
    "folder": ("kernels.so", replace_by_folder),
    "record binary": ("done", write(bytes(range(256)))),
    "record empty": ("done", write(b"")),
    "record old": ("done", write(b"kernels.so")),
    "record long": ("done", write(b"0" * 10_000)),
    "record absolute": ("done", elsewhere(None)),
    "record above": ("done", elsewhere("../../elsewhere")),
    "record link": ("done", replace_by_link),
    "record pipe": ("done", replace_by_pipe),
    "record folder": ("done", replace_by_folder),
    "group": ("kernels.so", lambda path: path.chmod(0o620)),
    "others": ("kernels.so", lambda path: path.chmod(0o602)),
    "record group": ("done", lambda path: path.chmod(0o620)),
    "folder group": (".", lambda path: path.chmod(0o770)),
    "folder others": (".", lambda path: path.chmod(0o707)),
    "folder sticky": (".", lambda path: path.chmod(0o1777)),
}


def assert_built_anew(folder, caplog):
    """One line says why; what is found then is right and kept."""
    assert isinstance(find(folder), str)
    with caplog.at_level(logging.WARNING):
        assert content_of(folder) == CONTENT
    (record,) = caplog.records
    assert str(folder) in record.getMessage() and "built anew" in record.getMessage()
    assert content_of(folder, refuse_to_make) == CONTENT
    assert sorted(path.name for path in folder.parent.iterdir()) == ["entry", "entry.lock"]


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_or_open_to_others_is_built_anew(folder, caplog, name, damage):
    content_of(folder)
    damage(folder / name)
    assert_built_anew(folder, caplog)


@as_root
@pytest.mark.parametrize("name", [".", "done", "kernels.so"])
def test_what_belongs_to_another_user_is_built_anew(folder, caplog, name):
    content_of(folder)
    os.chown(folder / name, STRANGER, -1)
    assert_built_anew(folder, caplog)


def test_damage_is_the_reason_where_nothing_may_be_built(folder, monkeypatch):
    content_of(folder)
    os.truncate(folder / "kernels.so", 4096)
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_KERNELS", "cached")
    with pytest.raises(KernelsUnavailableError, match=r"is 'cached' and .*kernels.so is damaged"):
        content_of(folder, refuse_to_make)


@pytest.mark.parametrize("above", [0, 1], ids=["cache", "parent"])
@pytest.mark.parametrize(
    ("mode", "writers"), [(0o770, "its group"), (0o777, "every user"), (0o703, "every user")]
)
@pytest.mark.parametrize("is_built", [True, False])
def test_a_cache_that_others_can_write_to_is_refused(tmp_path, above, mode, writers, is_built):
    """With the path and what can be done; nothing in it is read or made."""
    parent = tmp_path / "parent"
    folder = parent / "cache" / "entry"
    folder.parent.mkdir(parents=True, mode=0o700)
    if is_built:
        content_of(folder)
    path = (folder.parent, parent)[above]
    path.chmod(mode)
    with pytest.raises(KernelsUnavailableError) as raised:
        content_of(folder, refuse_to_make)
    assert f"{writers} can write to {path} (`chmod go-w {path}` ends that)" in str(raised.value)
    assert "ADAPTIVE_LONGFORMER_CACHE names a folder that only you can write to" in str(
        raised.value
    )
    path.chmod(0o700)
    assert content_of(folder) == CONTENT


@as_root
@pytest.mark.parametrize("above", [0, 1], ids=["cache", "parent"])
def test_a_cache_of_another_user_is_refused(tmp_path, above):
    folder = tmp_path / "parent" / "cache" / "entry"
    content_of(folder)
    path = folder.parents[above]
    os.chown(path, STRANGER, -1)
    with pytest.raises(
        KernelsUnavailableError, match=f"{path} belongs to another user .*{STRANGER}"
    ):
        content_of(folder, refuse_to_make)


def test_a_sticky_folder_serves_above_the_cache_only(tmp_path):
    """As /tmp: others cannot rename or remove there what is ours, but put something beside it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    assert content_of(shared / "cache" / "entry") == CONTENT
    with pytest.raises(KernelsUnavailableError, match=f"every user can write to {shared}"):
        content_of(shared / "entry", refuse_to_make)


def test_folders_that_are_made_are_closed_to_others(tmp_path):
    before = os.umask(0o002)
    try:
        content_of(tmp_path / "new" / "cache" / "entry")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_link_to_the_cache_is_followed_before_anything_is_checked(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_CACHE", str(tmp_path / "link" / "cache"))
    assert cache.cache_folder() == (tmp_path / "real" / "cache").resolve()
    with pytest.raises(KernelsUnavailableError, match="link is not a folder"):
        content_of(tmp_path / "link" / "cache" / "entry", refuse_to_make)


def test_what_is_opened_stays_what_was_checked(folder):
    found = find_or_make(folder, make)
    (folder / "other").write_bytes(b"of somebody else")
    os.replace(folder / "other", folder / "kernels.so")
    with found.file as file:
        assert file.read() == CONTENT


@pytest.mark.parametrize("nth", range(4))
def test_a_disk_that_is_full_when_something_is_synced_heals(folder, monkeypatch, nth):
    calls, original = [], os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == nth + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        if nth < 2:
            with pytest.raises(KernelsUnavailableError, match="No space left on device"):
                content_of(folder)
            assert [path.name for path in folder.parent.iterdir()] == ["entry.lock"]
        else:  # a file system that does not sync folders
            assert content_of(folder) == CONTENT
    assert content_of(folder) == CONTENT


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "none", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("room", [0, 4096, 8192, 12288])
def test_a_full_disk_heals_when_there_is_room(small_disk, room):
    folder = small_disk / "cache" / "entry"
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        filler.truncate(filler.tell() - room)
    try:
        content_of(folder)
    except KernelsUnavailableError as error:
        assert "No space left on device" in str(error)
    else:
        pytest.fail("the disk was not full")
    (small_disk / "filler").unlink()
    assert content_of(folder) == CONTENT
    assert sorted(path.name for path in folder.parent.iterdir()) == ["entry", "entry.lock"]


def test_what_a_killed_builder_left_is_removed(folder):
    left = folder.parent / "entry.unfinished-killed"
    left.mkdir(parents=True, mode=0o700)
    (left / "kernels.so").write_bytes(CONTENT[:100])
    folder.parent.chmod(0o700)
    assert content_of(folder) == CONTENT and not left.exists()


HOLD = """
import sys, time
from pathlib import Path
from adaptive_longformer.attention.kernels.cache import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_it_is_said_for_whom_a_process_waits_and_not_for_ever(folder, monkeypatch, caplog):
    """The holder is stopped, as by Ctrl-Z."""
    monkeypatch.setattr(cache, "LOCK_PATIENCE", 0.3)
    monkeypatch.setattr(cache, "LOCK_TIMEOUT", 0.8)
    folder.parent.mkdir(mode=0o700)
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        try:
            reason = f"process {holder.pid} on .* has held {folder}.lock"
            with pytest.raises(KernelsUnavailableError, match=reason):
                content_of(folder, refuse_to_make)
        finally:
            holder.kill()
    (record,) = caplog.records
    assert f"Waiting for process {holder.pid} on " in record.getMessage()
    assert content_of(folder) == CONTENT, "a lock dies with its holder"


def test_it_is_said_after_five_seconds():
    assert cache.LOCK_PATIENCE == 5 and cache.LOCK_TIMEOUT <= 300


def no_locks(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")


def in_processes(count, function):
    """Exit statuses of processes that call a function at once."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            signal.alarm(60)  # whatever happens to a child, nobody waits for ever
            try:
                status = int(not function())
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("damage", [None, cut(4096)], ids=["new", "damaged"])
@pytest.mark.parametrize("has_locks", [True, False])
def test_processes_that_build_at_once_are_all_right(folder, monkeypatch, has_locks, damage):
    """Also on a file system without locks, as some NFS, where they do the same work."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    if damage is not None:
        content_of(folder)
        damage(folder / "kernels.so")
    assert in_processes(4, lambda: content_of(folder) == CONTENT) == [0] * 4
    assert content_of(folder, refuse_to_make) == CONTENT
    assert sorted(path.name for path in folder.parent.iterdir()) == ["entry", "entry.lock"]


def test_why_a_file_is_trusted_is_told(folder):
    found = find_or_make(folder, make)
    with found.file:
        told = found.why_trusted()
    for part in (
        str(folder / "kernels.so"),
        f"owner {os.geteuid()}, mode 600",
        f"{len(CONTENT)} bytes and SHA-256 {hashlib.sha256(CONTENT).hexdigest()[:12]}",
    ):
        assert part in told
