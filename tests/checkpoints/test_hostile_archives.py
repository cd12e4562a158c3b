"""Archives and pickles that ask for what they do not hold: looked at before torch reads them, or refused after."""

import io
import pickle
import resource
import struct
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from hostile import KEY, archive, assert_refused, span
from safetensors.torch import save_file

from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.errors import InputError

# A function by its name, and an argument of 1 GB: torch lets a pickle call it.
CALLS = {
    'bytearray': b'c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R',
    '_rebuild_device_tensor_from_cpu_tensor': b'ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n)R',
    '_rebuild_device_tensor_from_numpy': b'ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R',
}


@pytest.mark.parametrize('is_old', [False, True])
@pytest.mark.parametrize('name', CALLS)
def test_a_pickle_makes_no_memory(tmp_path, capsys, name, is_old):
    pickled = b'\x80\x02](' + CALLS[name] * 4 + b'e.'
    if is_old:
        torch.save({}, tmp_path / 'bad.pth', _use_new_zipfile_serialization=False)
        empty, *_ = pickle.dumps({}, 2), 0
        content = (tmp_path / 'bad.pth').read_bytes()
        (tmp_path / 'bad.pth').write_bytes(content.replace(empty, pickled, 1))
    else:
        archive(tmp_path / 'bad.pth', pickled)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = assert_refused(capsys, 'inspect', tmp_path / 'bad.pth')
    assert f'must hold tensors and plain values alone, got a {name}' in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


@pytest.mark.parametrize('name', ['items', 'values', 'keys', 'get', '__len__'])
@pytest.mark.parametrize('place', ['', 'params', 'optimizers'])
def test_a_pickle_replaces_no_method(tmp_path, capsys, name, place):
    class Section(OrderedDict):
        def __reduce__(self):
            return OrderedDict, (), {name: 3}, None, iter(super().items())

    section = Section(a=torch.zeros(3))
    torch.save(
        {'': section, 'params': {'params': section}, 'optimizers': {'optimizers': [section]}}[place],
        tmp_path / 'bad.pth',
    )
    error = assert_refused(capsys, 'inspect', tmp_path / 'bad.pth')
    assert f'must hold tensors and plain values alone, got a section with the attribute {name}' in error


def test_values_are_in_the_file(tmp_path, capsys):
    nothing = b'ctorch\nFloatTensor\nJ\x00\x00\x00\x10\x85R'  # 1 GB in a pickle of 30 bytes
    archive(tmp_path / 'bad.pth', b'\x80\x02}(X\x01\x00\x00\x00a' + nothing + b'X\x01\x00\x00\x00b' + nothing + b'u.')
    assert 'its tensors must have the values that it holds, got a' in assert_refused(
        capsys, 'inspect', tmp_path / 'bad.pth'
    )


def test_a_flipped_bit_is_noticed(tmp_path, capsys):
    """torch reads it: the sum that it saved with each value is that of zip, as `unzip -t` checks it."""
    torch.save(span().state_dict(), tmp_path / 'bad.pth')
    data = bytearray((tmp_path / 'bad.pth').read_bytes())
    value = span().state_dict()[KEY].numpy().tobytes()
    data[data.index(value) + 5] ^= 1
    (tmp_path / 'bad.pth').write_bytes(data)
    torch.load(tmp_path / 'bad.pth', weights_only=True)
    assert 'must have the checksum that it was saved with' in assert_refused(capsys, 'inspect', tmp_path / 'bad.pth')


@pytest.mark.parametrize('name', ['numel', 'detach', 'untyped_storage'])
def test_a_tensor_has_no_methods_of_its_own(tmp_path, capsys, name):
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.no_weight_decay = True
    torch.save({'a': weight}, tmp_path / 'good.pth')
    read_checkpoint(tmp_path / 'good.pth')
    stateful = b'ctorch._utils\n_rebuild_parameter_with_state\n'
    with zipfile.ZipFile(tmp_path / 'good.pth') as file:
        pickled = file.read('good/data.pkl')
        others = {entry.partition('/')[2]: file.read(entry) for entry in file.namelist()}
    assert stateful in pickled and b'no_weight_decay' in pickled
    others['data.pkl'] = pickled.replace(
        b'X' + struct.pack('<I', 15) + b'no_weight_decay', b'X' + struct.pack('<I', len(name)) + name.encode()
    )
    with zipfile.ZipFile(tmp_path / 'bad.pth', 'w') as file:
        for entry, content in others.items():
            file.writestr(f'bad/{entry}', content)
    assert 'must hold tensors as they are' in assert_refused(capsys, 'inspect', tmp_path / 'bad.pth')


@pytest.mark.parametrize('is_new', [True, False])
def test_tensors_are_counted_before_they_are_read(tmp_path, monkeypatch, is_new):
    path = tmp_path / 'many.pth'
    torch.save({f'{index}.weight': torch.zeros(1) for index in range(40)}, path, _use_new_zipfile_serialization=is_new)
    read_checkpoint(path)
    monkeypatch.setattr('lora_sr.checkpoints.archive.MOST_VALUES', 39)
    with pytest.raises(InputError, match='must hold at most 39 tensors, got more'):
        read_checkpoint(path)


def test_an_archive_is_no_larger_than_it_looks(tmp_path, capsys):
    whole, file = io.BytesIO(), tmp_path / 'bad.pth'
    torch.save(span().state_dict(), whole)
    with zipfile.ZipFile(whole) as members:
        content = {name.partition('/')[2]: members.read(name) for name in members.namelist()}
    archive(file, compression=zipfile.ZIP_DEFLATED, pickled=content.pop('data.pkl'), **content)
    assert 'must be stored as torch.save does it, got compressed members' in assert_refused(capsys, 'inspect', file)

    data = bytearray(whole.getvalue())
    with zipfile.ZipFile(whole) as members:
        start = members.start_dir
    for _ in range(2):  # both its sizes, in the list of members
        place = data.index(b'PK\x01\x02', start)
        data[place + 20 : place + 28] = struct.pack('<2I', 10**6, 10**6)
        start = place + 4
    file.write_bytes(data)
    assert 'its members must have at most its ' in assert_refused(capsys, 'inspect', file)

    hidden = whole.getvalue()[: members.start_dir]  # and a list that Python finds, behind the one that torch finds
    directory = whole.getvalue()[members.start_dir :]
    size = directory.index(b'PK\x06\x06')
    file.write_bytes(hidden + directory[:size] + directory)
    assert 'is damaged' in assert_refused(capsys, 'inspect', file)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize('form', ['new', 'old', 'no sums', 'safetensors'])
def test_sound_files_are_read(tmp_path, dtype, form):
    state = {'a.weight': torch.ones(3, 4).to(dtype), 'b': torch.zeros(0).to(dtype)}
    file = tmp_path / ('a.safetensors' if form == 'safetensors' else 'a.pth')
    if form == 'safetensors':
        save_file(state, file)
    elif form == 'no sums' and hasattr(torch.serialization, 'set_crc32_options'):
        torch.serialization.set_crc32_options(False)
        torch.save(state, file)
        torch.serialization.set_crc32_options(True)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form != 'old')
    content = read_checkpoint(file)
    assert all(torch.equal(content[key].float(), value.float()) for key, value in state.items())


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('protocol', [0, 1, 3, 4, 5])
def test_formats_are_no_matter_for_warnings(tmp_path, capsys, protocol):
    archive(tmp_path / 'bad.pth', pickle.dumps({'a': 3}, protocol))
    assert 'bad.pth' in assert_refused(capsys, 'inspect', tmp_path / 'bad.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        value = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        torch.save({'a': value}, tmp_path / 'bad.pth')
    assert 'got qint8' in assert_refused(capsys, 'inspect', tmp_path / 'bad.pth')
