"""Files that are written whole or not at all: under names that nobody can guess, and without a trace of killed runs."""

import os
import signal
import stat

import pytest
import torch

from lora_sr import files
from lora_sr.checkpoints.origin import Origin
from lora_sr.checkpoints.writing import write_state
from lora_sr.errors import InputError
from lora_sr.files import (
    partial_folder,
    replacing,
    replacing_together,
    save_atomically,
    was_interrupted,
    write_whole,
)

TOKEN = '0123456789abcdef'
WRITERS = {
    'write_whole': lambda path: write_whole(path, b'data'),
    'save_atomically': lambda path: save_atomically({'a': 1}, path),
    'write_state': lambda path: write_state({'a': torch.zeros(1)}, path, Origin()),
}
needs_locks = pytest.mark.skipif(files.fcntl is None, reason='this system has no locks')


@pytest.fixture
def killed():
    """A function: enter a context in another process, and kill that there."""

    def kill(context):
        process = os.fork()
        if not process:
            try:
                with context:
                    os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL

    return kill


@pytest.mark.parametrize('writer', WRITERS)
def test_a_planted_link_is_not_followed(tmp_path, monkeypatch, writer):
    path, victim = tmp_path / 'a.pth', tmp_path / 'victim'
    victim.write_text('mine')
    monkeypatch.setattr(files, 'SAVE_PAUSE', 0)
    monkeypatch.setattr(files.secrets, 'token_hex', lambda _: TOKEN)  # somebody has guessed it
    for name in (f'.a.{TOKEN}.partial.pth', f'.a.pth.{TOKEN}.partial'):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(InputError, match='a.pth cannot be written: File exists'):
        WRITERS[writer](path)
    assert victim.read_text() == 'mine' and not path.exists()


@pytest.mark.parametrize('writer', WRITERS)
def test_names_are_random_and_permissions_the_usual(tmp_path, writer):
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    for name in (f'.a.{os.getpid()}.partial.pth', f'a.pth.{os.getpid()}.tmp', '.a.pth.partial'):
        (tmp_path / name).symlink_to(victim)
    before = os.umask(0o027)
    try:
        WRITERS[writer](tmp_path / 'a.pth')
    finally:
        os.umask(before)
    assert victim.read_text() == 'mine'
    assert (tmp_path / 'a.pth').stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 5


@needs_locks
def test_what_killed_runs_left_goes_with_the_next_to_the_same_place(tmp_path, killed):
    path, other = tmp_path / 'a.png', tmp_path / 'b.png'
    killed(replacing(path))
    killed(replacing(other))
    assert len(list(tmp_path.iterdir())) == 2
    write_whole(path, b'data')
    assert {file.name.split('.')[1] for file in tmp_path.iterdir() if file != path} == {'b'} and path.exists()


@needs_locks
def test_what_a_live_run_writes_stays(tmp_path):
    path = tmp_path / 'a.png'
    with replacing(path) as first:
        first.write_bytes(b'first')
        files._found_first.cache_clear()  # as in another process
        write_whole(path, b'second')
        assert path.read_bytes() == b'second'
    assert path.read_bytes() == b'first' and list(tmp_path.iterdir()) == [path]


@needs_locks
def test_links_and_files_of_others_names_stay(tmp_path):
    victim = tmp_path / 'victim'
    victim.mkdir()
    (victim / 'file').touch()
    names = [f'.run.{TOKEN}.partial', '.run.partial', f'.run.{TOKEN}x.partial', f'run.{TOKEN}.partial']
    (tmp_path / names[0]).symlink_to(victim)
    for name in names[1:]:
        (tmp_path / name).touch()
    with partial_folder(tmp_path, 'run'):
        pass
    assert (victim / 'file').exists() and sorted(os.listdir(tmp_path)) == sorted([*names, 'victim'])


@needs_locks
def test_folders_of_killed_runs(tmp_path, killed):
    killed(partial_folder(tmp_path, 'run'))
    (left,) = tmp_path.iterdir()
    (left / 'file').touch()
    with partial_folder(tmp_path, 'run') as partial:
        assert list(tmp_path.iterdir()) == [partial] and partial != left
    assert not list(tmp_path.iterdir())


def test_files_that_go_together(tmp_path):
    paths = [tmp_path / 'a.md', tmp_path / 'b.png']

    def write(overwrite=False, error=None):
        with replacing_together(paths, overwrite) as partials:
            for partial, name in zip(partials, 'ab'):
                partial.write_text(name)
            if error:
                raise error

    with pytest.raises(ValueError, match='why'):
        write(error=ValueError('why'))
    assert not list(tmp_path.iterdir())
    write()
    assert [path.read_text() for path in paths] == ['a', 'b'] and len(list(tmp_path.iterdir())) == 2
    paths[0].write_text('mine')
    paths[1].unlink()
    with pytest.raises(InputError, match=r'a.md exists: choose another name, or allow it with --overwrite'):
        write()
    assert paths[0].read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1
    write(overwrite=True)
    paths[1].unlink()
    write()  # what is there is what would be written
    assert [path.read_text() for path in paths] == ['a', 'b']


@needs_locks
def test_who_only_looks_leaves_nothing_behind(tmp_path, monkeypatch):
    """Another process looks for killed runs just when a file has been made, and before it is locked."""
    make, seen = files._make_file, []

    def make_and_look(path):
        make(path)
        if not seen:
            seen.append(os.open(path, os.O_RDWR))
            files.fcntl.flock(seen[0], files.fcntl.LOCK_EX)

    monkeypatch.setattr(files, '_make_file', make_and_look)
    write_whole(tmp_path / 'a.md', b'data')
    os.close(seen[0])
    assert list(tmp_path.iterdir()) == [tmp_path / 'a.md']


@pytest.mark.parametrize('write', [lambda path: write_whole(path, b''), lambda path: write_together([path])])
def test_pipes_and_devices_are_not_replaced(tmp_path, write):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', tmp_path):
        with pytest.raises(InputError, match='must be a file, got a (pipe or a device|folder)'):
            write(path)
    assert stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)


def write_together(paths):
    with replacing_together(paths, True):
        pass


@needs_locks
def test_a_killed_run_is_known_by_what_it_left(tmp_path, killed):
    paths = [tmp_path / 'a.md', tmp_path / 'b.png']
    assert not was_interrupted(paths)
    with replacing(paths[1]):
        assert not was_interrupted(paths)  # it is at work
    killed(replacing(paths[1]))
    assert was_interrupted(paths) and not was_interrupted(paths[:1])


@needs_locks
@pytest.mark.parametrize('length', [180, 240, 251])
def test_names_of_any_length(tmp_path, killed, length):
    """What is hidden has a longer name than what it becomes, which may have 255 bytes."""
    path = tmp_path / f'{"ä" * (length // 2)}.png'
    killed(replacing(path))
    assert len(list(tmp_path.iterdir())) == 1
    write_whole(path, b'data')
    assert path.read_bytes() == b'data' and list(tmp_path.iterdir()) == [path]
