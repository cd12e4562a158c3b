"""Which compiled kernels are loaded: those that only we can have written, and that are whole; and what is said else."""

import os
import shutil
from pathlib import Path

import pytest

from lora_sr.runtime.native import library as module

SMALL_SOURCE = '\n'.join(f'extern "C" int {name}() {{ return 7; }}' for name in module.FUNCTIONS)
RETRIED = 'compiled again'


def load():
    return module._load_library.__wrapped__()


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
    """A cache with a library in it, compiled of a file of a few lines."""
    if not any(map(shutil.which, module.COMPILERS)):
        pytest.skip('there is no C++ compiler')
    folder = tmp_path_factory.mktemp('compiled')
    (folder / 'kernels.cpp').write_text(SMALL_SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('CXX', raising=False)
        patch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
        patch.setattr(module, 'SOURCE', folder / 'kernels.cpp')
        assert load() is not None
    return folder


@pytest.fixture
def cache(compiled, tmp_path, monkeypatch):
    """A copy of it, in use. Nothing can be compiled: what is not loaded from there is not loaded."""

    def refuse(*_):
        raise OSError(RETRIED)

    shutil.copytree(compiled / 'cache', tmp_path / 'above' / 'cache')
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'above' / 'cache'))
    monkeypatch.setattr(module, 'SOURCE', compiled / 'kernels.cpp')
    monkeypatch.setattr(module, '_compiled', refuse)
    return tmp_path / 'above' / 'cache'


def only_library(cache: Path) -> Path:
    (library,) = (cache / 'lora_sr').iterdir()
    return library


def test_what_is_kept_is_loaded(cache):
    assert load().most_inputs() == 7
    mode = only_library(cache).stat().st_mode
    assert not mode & 0o022


def cut_short(cache):
    library = only_library(cache)
    library.write_bytes(library.read_bytes()[:4096])  # to load it would end Python with SIGBUS


def change_a_byte(cache):
    library = only_library(cache)
    data = bytearray(library.read_bytes())
    data[-1] ^= 1
    library.write_bytes(data)


def let_others_write_the_library(cache):
    only_library(cache).chmod(0o757)


def let_the_group_write_the_library(cache):
    only_library(cache).chmod(0o775)


def let_others_write_the_folder(cache):
    (cache / 'lora_sr').chmod(0o1777)


def let_others_write_a_folder_above(cache):
    cache.parent.chmod(0o777)


def link_the_library(cache):
    library = only_library(cache)
    os.replace(library, cache / library.name)
    library.symlink_to(cache / library.name)


def link_by_way_of_a_folder_of_others(cache):
    os.rename(cache, cache.parent.parent / 'real')
    cache.symlink_to(cache.parent.parent / 'real')
    cache.parent.chmod(0o777)


def link_to_a_folder_below_one_of_others(cache):
    open_folder = cache.parent.parent / 'open'
    open_folder.mkdir()
    os.rename(cache, open_folder / 'cache')
    cache.symlink_to(open_folder / 'cache')
    open_folder.chmod(0o777)


def give_away(path):
    if os.geteuid():
        pytest.skip('only root can give a file away')
    os.lchown(path, 12345, -1)


def give_the_library_away(cache):
    give_away(only_library(cache))


def give_the_folder_away(cache):
    give_away(cache / 'lora_sr')


def give_a_folder_above_away(cache):
    give_away(cache.parent)


def give_a_link_away(cache):
    os.rename(cache, cache.parent / 'real')
    cache.symlink_to('real')
    give_away(cache)


@pytest.mark.parametrize(
    'change',
    [
        *(cut_short, change_a_byte, let_others_write_the_library, let_the_group_write_the_library),
        *(let_others_write_the_folder, let_others_write_a_folder_above, link_the_library),
        *(link_by_way_of_a_folder_of_others, link_to_a_folder_below_one_of_others),
        *(give_the_library_away, give_the_folder_away, give_a_folder_above_away, give_a_link_away),
    ],
)
def test_what_others_may_have_written_or_is_not_whole_is_not_loaded(cache, caplog, change):
    change(cache)
    assert load() is None
    assert f'torch alone runs: {RETRIED}' in caplog.text
    if 'folder' in change.__name__ or 'link_away' in change.__name__:
        assert 'The kernels are not kept, as others may write to' in caplog.text


def test_links_of_our_own_are_followed(cache):
    os.rename(cache, cache.parent / 'real')
    cache.symlink_to('real')
    assert load() is not None


@pytest.mark.parametrize('umask', [0o002, 0o077])
def test_what_is_damaged_is_compiled_again(compiled, tmp_path, monkeypatch, umask):
    shutil.copytree(compiled / 'cache', tmp_path / 'cache')
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(module, 'SOURCE', compiled / 'kernels.cpp')
    cut_short(tmp_path / 'cache')
    left = tmp_path / 'cache' / 'lora_sr' / f'.kernels.{"0" * 16}.partial'  # by a process that was killed
    left.mkdir()
    before = os.umask(umask)
    try:
        assert load() is not None
    finally:
        os.umask(before)
    assert module._is_whole(only_library(tmp_path / 'cache'))


def test_a_library_that_lacks_a_function_is_told(tmp_path, monkeypatch, caplog):
    if not any(map(shutil.which, module.COMPILERS)):
        pytest.skip('there is no C++ compiler')
    source = tmp_path / 'kernels.cpp'
    source.write_text(SMALL_SOURCE.replace('int scratch', 'int another'))
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(module, 'SOURCE', source)
    assert load() is None
    (message,) = caplog.messages
    assert message.endswith('.so lacks the function scratch') and 'torch alone runs: ' in message


@pytest.mark.parametrize(
    ('value', 'words'),
    [
        (b"g++ '-O2", "$CXX must be a command, got g++ '-O2, so torch alone runs: no closing quotation"),
        (b'\xff++', r'\udcff++ cannot compile the kernels for CPUs, so torch alone runs: '),
        (b'false', 'false cannot compile the kernels for CPUs, so torch alone runs: '),
        (b'sh -c "echo >&2; exit 1"', 'so torch alone runs: Command '),
        (b'sh -c "printf \'error: \\\\377\' >&2; exit 1"', 'so torch alone runs: error: \ufffd'),
    ],
)
def test_a_compiler_that_is_none_is_told_in_a_sentence(tmp_path, monkeypatch, caplog, value, words):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('CXX', os.fsdecode(value))
    assert load() is None
    (message,) = caplog.messages
    assert words in message and '\n' not in message
    message.encode()  # it can be printed
