"""`lora-sr upscale`: what is refused, replaced and left behind, and what is told."""

import os
import resource
import shutil
import threading

import pytest
import torch
from enlarging import Enlarge, pixels
from PIL import Image
from upscaling import files_in, run

from lora_sr.deploy import upscale as module
from lora_sr.deploy.upscale import upscale
from lora_sr.errors import InputError
from lora_sr.runtime.upscaler import Upscaler


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('in/a.png', 'in/b.png', 'in/sub/a.png'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(5, 5, 3)).save(path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('text')
    os.mkfifo(tmp_path / 'pipe.png')
    return tmp_path


@pytest.mark.parametrize(
    'inputs, output, options, words',
    [
        (['missing.png'], 'out', {}, 'There is no file or folder missing.png'),
        (['*.jpg'], 'out', {}, r'\*.jpg has no images'),
        (['empty'], 'out', {}, 'empty has no images'),
        (['in'], 'in', {}, 'The output in/a.png is the input in/a.png'),
        (['in'], 'in', {'overwrite': True}, 'The output in/a.png is the input in/a.png'),
        (['in/a.png', 'in/sub/a.png'], 'out', {}, 'in/a.png and in/sub/a.png would have the same output, out/a.png'),
        (['in'], 'out.png', {}, 'The output out.png is a file, where a folder is right'),
        (['in/a.png', 'in/b.png'], 'out.png', {}, 'The output out.png is a file, where a folder is right'),
        (['in/a.png'], 'file', {}, 'The output file is a file, where a folder is right'),
        (['in/a.png'], 'file/deeper', {}, 'The output folder file/deeper cannot be written: Not a directory'),
        (['in/a.png'], 'out.png', {'file_format': 'jpeg'}, 'The output out.png is no jpeg file'),
        (['in/a.png'], 'in/sub', {}, 'The output in/sub/a.png exists'),
        ([''], 'out', {}, 'An input is empty'),
        (['in/a.png'], '', {}, 'The output is empty'),
        (['in/a.png'], 'out.gif', {}, 'The output out.gif ends in .gif, where .png, .jpg, .* are right for a file'),
        (['pipe.png'], 'out', {}, 'pipe.png is neither a file nor a folder'),
        (['in/a.png'], 'out', {'quality': 0}, 'The quality is 0'),
        (['in/a.png'], 'out', {'tile': 3}, 'A tile of 3 is too small for SPAN'),
        (['in/a.png'], 'out', {'model': 'file'}, 'file'),
        (['in/a.png'], 'out', {'model': 'missing.pth'}, 'missing.pth'),
    ],
)
def test_wrong_calls_leave_nothing_behind(images, checkpoint, inputs, output, options, words):
    before = sorted(images.rglob('*'))
    content = {path: path.read_bytes() for path in before if path.is_file()}
    with pytest.raises(InputError, match=words) as caught:
        upscale(inputs, **{'model': checkpoint, 'output': output, **options})
    assert '\n' not in str(caught.value)
    assert sorted(images.rglob('*')) == before
    assert all(path.read_bytes() == value for path, value in content.items())


def test_an_unknown_family_is_named(images):
    torch.save({'params': {'strange.weight': torch.zeros(3)}}, images / 'strange.pth')
    with pytest.raises(InputError, match='strange.pth belongs to no network known here'):
        upscale(['in'], 'strange.pth', 'out')
    assert not (images / 'out').exists()
    assert run('in', '-m', 'strange.pth', '-o', 'out') == 2


@pytest.mark.parametrize('link', [os.symlink, os.link])
def test_the_input_is_never_replaced_through_links(images, enlarging, link):
    (images / 'out').mkdir()
    link(images / 'in/a.png', images / 'out/b.png')  # the output of another input
    before = (images / 'in/a.png').read_bytes()
    with pytest.raises(InputError, match='The output out/b.png is the input in/a.png'):
        upscale(['in/a.png', 'in/b.png'], 'any.pth', 'out', overwrite=True)
    os.symlink(images / 'in', images / 'linked')
    with pytest.raises(InputError, match='is the input'):
        upscale(['in'], 'any.pth', 'linked', overwrite=True)
    assert (images / 'in/a.png').read_bytes() == before


def test_pipes_in_a_folder_are_not_waited_for(images, enlarging):
    os.mkfifo(images / 'in/pipe.png')
    os.symlink(images / 'nowhere', images / 'in/link.png')
    report = upscale(['in'], 'any.pth', 'out')
    assert report.images == 3 and list(report.failures) == ['in/link.png']


def test_folders_with_a_dot(images, enlarging):
    upscale(['in'], 'any.pth', 'out.x2')
    assert files_in(images / 'out.x2') == ['a.png', 'b.png', 'sub/a.png']
    upscale(['in/a.png'], 'any.pth', 'out.x2', overwrite=True)


def test_existing_outputs_need_overwrite(images, enlarging):
    upscale(['in'], 'any.pth', 'out')
    with pytest.raises(InputError, match='The output out/a.png and 2 more exist: .* --overwrite'):
        upscale(['in'], 'any.pth', 'out')
    (images / 'out/a.png').write_text('old')
    upscale(['in'], 'any.pth', 'out', overwrite=True)
    assert Image.open(images / 'out/a.png').size == (10, 10)


def test_a_stopped_run_goes_on_with_skip_existing(images, enlarging, monkeypatch, capsys):
    with pytest.raises(InputError, match='exists: .* --skip-existing'):
        upscale(['in/a.png'], 'any.pth', 'in/sub')
    (images / 'out').mkdir()
    (images / f'out/.b.{"0" * 16}.partial.png').write_text('half')  # left by a run that was killed
    upscale(['in'], 'any.pth', 'out')
    (images / 'out/a.png').write_text('old')
    (images / 'out/b.png').unlink()
    assert run('in', '-m', 'any.pth', '-o', 'out', '--skip-existing') == 0
    out, err = capsys.readouterr()
    assert out.startswith('1 image in ') and 'lora-sr: note: 2 images skipped, as the output exists.' in err
    assert files_in(images / 'out') == ['a.png', 'b.png', 'sub/a.png']
    assert (images / 'out/a.png').read_text() == 'old' and Image.open(images / 'out/b.png').size == (10, 10)
    monkeypatch.setattr(module, 'load_network', None)  # nothing is left for it
    report = upscale(['in'], 'any.pth', 'out', skip_existing=True)
    assert report.images == 0 and report.notes == ['3 images skipped, as the output exists.']
    with pytest.raises(InputError, match='replaced with --overwrite or kept with --skip-existing, not both'):
        upscale(['in'], 'any.pth', 'out', overwrite=True, skip_existing=True)
    with pytest.raises(InputError, match='The output in/a.png is the input in/a.png'):
        upscale(['in'], 'any.pth', 'in', skip_existing=True)


def test_a_text_file_among_images(images, enlarging, capsys):
    assert run('file', 'in/a.png', '-m', 'any.pth', '-o', 'out') == 1
    out, err = capsys.readouterr()
    assert 'lora-sr: error: file is no image by its name, which should end in .png, .jpg' in err
    assert out.startswith('1 image in') and files_in(images / 'out') == ['a.png']


def test_full_disk_leaves_no_partial_file(images, enlarging):
    """A limit on the size of files is as good as a full disk."""
    Image.fromarray(pixels(300, 300, 3)).save(images / 'in/c.png')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match='The output out/c.png cannot be written: File too large'):
            upscale(['in/a.png', 'in/c.png'], 'any.pth', 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(images / 'out') == ['a.png']


def test_no_permission_is_told_before_the_network_is_loaded(images, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(module.tempfile, 'TemporaryFile', refuse)
    monkeypatch.setattr(module, 'load_network', None)
    with pytest.raises(InputError, match='The output folder out cannot be written: Permission denied'):
        upscale(['in'], 'any.pth', 'out')
    assert not (images / 'out').exists()


def test_interrupting_leaves_whole_files(images, monkeypatch, capsys):
    class Interrupted(Enlarge):
        def forward(self, x):
            if x.shape[-1] == 77:
                raise KeyboardInterrupt
            return super().forward(x)

    monkeypatch.setattr(module, 'load_network', lambda path: Interrupted())
    Image.fromarray(pixels(5, 77, 3)).save(images / 'in/b.png')
    assert run('in', '-m', 'any.pth', '-o', 'out') == 130
    assert 'interrupted' in capsys.readouterr().err
    assert set(files_in(images / 'out')) <= {'a.png'}
    for name in files_in(images / 'out'):
        Image.open(images / 'out' / name).load()


def test_few_images_wait(images, enlarging, monkeypatch):
    """However slow the writing is beside the network, no more than a few results are in memory."""
    gate, made, by_then = threading.Event(), [], []
    write = module._write

    def slow(*args):
        gate.wait(20)
        return write(*args)

    class Counting(Upscaler):
        def __call__(self, *args):
            made.append(1)
            return super().__call__(*args)

    monkeypatch.setattr(module, '_write', slow)
    monkeypatch.setattr(module, 'Upscaler', Counting)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 0)
    for number in range(100):
        shutil.copy(images / 'in/a.png', images / f'in/{number:02}.png')
    threading.Timer(0.5, lambda: (by_then.append(len(made)), gate.set())).start()
    assert upscale(['in'], 'any.pth', 'out').images == 103
    assert by_then == [min(103, len(os.sched_getaffinity(0)) + 2)]


def test_bursts_of_writing(images, enlarging, monkeypatch):
    """Where the network takes all cores, it pauses for writing, before too many results wait."""
    events = []
    write = module._write

    class Noting(Upscaler):
        def __call__(self, *args):
            events.append('run')
            result = super().__call__(*args)
            events.append('ran')
            return result

    def noting(*args):
        events.append('write')
        return write(*args)

    monkeypatch.setattr(module, '_write', noting)
    monkeypatch.setattr(module, 'Upscaler', Noting)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1 << 20)
    for number in range(7):
        shutil.copy(images / 'in/a.png', images / f'in/{number}.png')  # ten in all, of 300 bytes when upscaled
    made = ['run', 'ran']
    for seconds, waiting, expected in (
        (1e9, 1 << 30, 10 * made + 10 * ['write']),
        (0, 1 << 30, 10 * [*made, 'write']),
        (1e9, 1000, 2 * (4 * made + 4 * ['write']) + 2 * made + 2 * ['write']),
    ):
        monkeypatch.setattr(module, 'BURST_SECONDS', seconds)
        monkeypatch.setattr(module, 'WAITING_BYTES', waiting)
        events.clear()
        upscale(['in'], 'any.pth', 'out', overwrite=True)
        assert events == expected
    assert len(files_in(images / 'out')) == 10


def test_report_of_networks_that_look_at_the_whole_image(images, monkeypatch, capsys):
    class Mean(Enlarge):
        def forward(self, x):
            return super().forward(x) + 0.1 * x.mean((2, 3), keepdim=True)

    monkeypatch.setattr(module, 'load_network', lambda path: Mean())
    assert run('in', '-m', 'any.pth', '-o', 'out', '--tile', 200) == 0
    assert 'note: Mean looks at the whole image' in capsys.readouterr().err
