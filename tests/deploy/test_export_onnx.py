"""`lora-sr export onnx`: onnxruntime gives the trained network's images, and the graph is the deployed network's."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from basicsr.archs import swinir_arch
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.swinir_arch import SwinIR
from exported import TRAINED, psnr, save_trained, skip_without_half, soft_images

import lora_sr
from lora_sr.archs import fold
from lora_sr.archs.lkdn import LKDB
from lora_sr.checkpoints import load_network
from lora_sr.cli.main import main
from lora_sr.deploy.exports import deployed, export_onnx
from lora_sr.errors import InputError
from lora_sr.runtime.float16 import fit_float16

onnx = pytest.importorskip('onnx', reason='the export to ONNX needs the extra "onnx"')
onnxruntime = pytest.importorskip('onnxruntime', reason='the export to ONNX needs the extra "onnx"')

OFFICIAL = ('spantiny_ch26_x4', 'span_ch28_x4', 'DSCF_ch26_x4', 'LKDN_x4', 'LKDN-S_x4', 'LKDN-S_del_rep_x4')


def runner(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda image: torch.from_numpy(session.run(None, {'input': image.numpy()})[0])


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@torch.no_grad()
@pytest.mark.parametrize('name', TRAINED)
def test_file_gives_the_images_of_the_trained_network(tmp_path, capsys, name):
    network = save_trained(TRAINED[name], tmp_path / 'net.pth')
    assert main(['export', 'onnx', str(tmp_path / 'net.pth'), '-o', str(tmp_path / 'net.onnx')]) == 0
    assert f'wrote {tmp_path / "net.onnx"}' in capsys.readouterr().out
    run = runner(tmp_path / 'net.onnx')
    for image in soft_images():
        expected = network(image.double())
        assert (run(image) - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
    written = metadata(tmp_path / 'net.onnx')
    assert json.loads(written.pop('lora_sr'))['version'] == lora_sr.__version__
    assert written == {
        'family': 'LKDN' if name == 'LKDN' else 'SPAN',
        'scale': str(network.upscale),
        'channels': '3',
        'value_range': '[0, 1]',
        'size_multiple': '1',
        'dtype': 'float32',
        'lora_sr_version': lora_sr.__version__,
    }


@pytest.mark.parametrize(
    'name, expected',
    [
        ('SPAN', {'Conv': 22, 'DepthToSpace': 1, 'Sigmoid': 18, 'Concat': 1}),
        ('LKDN', {'Conv': 2 + 2 * 16 + 1 + 2 + 1, 'DepthToSpace': 1, 'LayerNormalization': 2, 'Transpose': 4}),
    ],
)
def test_graph_is_the_deployed_network(tmp_path, name, expected):
    save_trained(TRAINED[name], tmp_path / 'net.pth')
    export_onnx(tmp_path / 'net.pth', tmp_path / 'net.onnx')
    model = onnx.load(tmp_path / 'net.onnx')
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [('', 17)]
    counts = Counter(node.op_type for node in model.graph.node)
    assert {key: counts[key] for key in expected} == expected
    assert counts.keys() <= expected.keys() | {'Add', 'Sub', 'Mul', 'Div', 'Erf', 'Constant', 'Concat'}
    (shuffle,) = (node for node in model.graph.node if node.op_type == 'DepthToSpace')
    assert {entry.name: onnx.helper.get_attribute_value(entry) for entry in shuffle.attribute}['mode'] == b'CRD'
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes['input'] == ['batch', 3, 'height', 'width']
    assert shapes['output'][:2] == ['batch', 3] and not any(isinstance(side, int) for side in shapes['output'][2:])


@torch.no_grad()
@pytest.mark.parametrize('name', OFFICIAL)
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_official_weights_give_the_images_of_their_authors_code(shared, tmp_path, name, dtype):
    weights = json.loads((shared / 'reference.json').read_text())['measured_with_official_code'][name]['weights']
    truth = np.load(shared / f'golden/networks/{name}.npz')
    export_onnx(shared / weights, tmp_path / 'net.onnx', dtype)
    run = runner(tmp_path / 'net.onnx')
    network = load_network(shared / weights)
    pairs = [tuple(torch.from_numpy(truth[key]) for key in ('lr', 'sr'))]
    pairs += [(image, network(image)) for image in soft_images()]
    for image, expected in pairs:
        given = run(image)
        if dtype == 'float32':
            assert (given - expected).abs().max() <= 1e-4
        else:
            assert given.dtype == torch.float32 and psnr(given, expected) >= 60


@pytest.mark.parametrize('name', TRAINED)
def test_float16_is_float16_but_for_the_images(tmp_path, name):
    save_trained(TRAINED[name], tmp_path / 'net.pth')
    export_onnx(tmp_path / 'net.pth', tmp_path / 'net.onnx', 'float16')
    model = onnx.load(tmp_path / 'net.onnx')
    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    assert {tensor.data_type for tensor in model.graph.initializer} == {float16}
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [float32] * 2
    casts = [node for node in model.graph.node if node.op_type == 'Cast']
    assert [node.input[0] == 'input' or node.output[0] == 'output' for node in casts] == [True, True]
    assert metadata(tmp_path / 'net.onnx')['dtype'] == 'float16'


@torch.no_grad()
@pytest.mark.parametrize('name', ['LKDN_x4', 'LKDN-S_del_rep_x4'])
def test_fitting_to_float16_changes_no_bit_in_float32(shared, name):
    weights = shared / f'weights/LKDN/{name}.pth'
    network, fitted = (fold(load_network(weights)) for _ in range(2))
    images = soft_images()
    fit_float16(fitted, images[:1])
    assert all(torch.equal(fitted(image), network(image)) for image in images)
    largest = {}
    for module in (part for block in fitted.modules() if isinstance(block, LKDB) for part in block.modules()):
        module.register_forward_hook(lambda m, _, output: largest.update({m: output.abs().max().item()}))
    image = torch.from_numpy(np.load(shared / f'golden/networks/{name}.npz')['lr'])
    expected = network(image)
    skip_without_half(torch.float16)
    fitted.half()
    assert psnr(fitted(image.half()), expected) >= 60
    assert max(largest.values()) <= 1024  # 64 times below the end of float16


@torch.no_grad()
def test_fitting_to_float16_keeps_what_epsilon_adds():
    torch.manual_seed(0)
    network, images = fold(TRAINED['LKDN']()).eval(), soft_images()
    for block in (network.B1, network.B2):
        block.c5.weight.mul_(100)
        block.atten.pointwise.bias.add_(100)
        block.c6.weight.mul_(1000)
        block.pixel_norm.eps = 1e5
    expected = [network(image) for image in images]
    weights = network.state_dict()
    before = {key: value.clone() for key, value in weights.items()}
    fit_float16(network, images)
    changed = {key.partition('.')[2] for key, value in weights.items() if not torch.equal(value, before[key])}
    layers = ('c5', 'atten.pointwise', 'atten.depthwise', 'atten.depthwise_dilated', 'c6')
    assert changed == {f'{layer}.{name}' for layer in layers for name in ('weight', 'bias')}
    assert network.B1.pixel_norm.eps < 1e5
    assert all(map(torch.equal, map(network, images), expected))


def test_lkdn_that_leaves_float16_is_refused(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(deployed, 'fit_float16', lambda network, images: network)
    with pytest.raises(InputError, match='LKDN_x4.pth is not exact enough in float16: .* 60 dB are right'):
        export_onnx(shared / 'weights/LKDN/LKDN_x4.pth', tmp_path / 'net.onnx', 'float16')
    assert not list(tmp_path.iterdir())


SWINIR = {'embed_dim': 8, 'depths': [2], 'num_heads': [2], 'mlp_ratio': 2, 'window_size': 8}


@torch.no_grad()
@pytest.mark.parametrize(
    'build, multiple, dtypes',
    [
        (lambda: SwinIR(32, upscale=2, upsampler='pixelshuffledirect', **SWINIR), 8, ['float32']),
        (lambda: RRDBNet(3, 3, 2, num_feat=8, num_block=1, num_grow_ch=4), 2, ['float32', 'float16']),
    ],
    ids=['SwinIR', 'RRDBNet x2'],
)
def test_networks_that_want_multiples_say_so(tmp_path, build, multiple, dtypes):
    network = save_trained(build, tmp_path / 'net.pth')
    for dtype in dtypes:
        report = export_onnx(tmp_path / 'net.pth', tmp_path / 'net.onnx', dtype, overwrite=True)
        assert f'height and width in multiples of {multiple}\n' in str(report)
        written = metadata(tmp_path / 'net.onnx')
        assert written['size_multiple'] == str(multiple) and written['scale'] == '2'
        run = runner(tmp_path / 'net.onnx')
        for image in soft_images(multiple=multiple):
            expected = network(image.double())
            if dtype == 'float32':
                assert (run(image) - expected).abs().max() <= 1e-4
            else:
                assert psnr(run(image), expected) >= 60


def test_file_that_is_wrong_for_some_size_is_not_kept(tmp_path, monkeypatch):
    network = SwinIR(32, upscale=2, upsampler='pixelshuffledirect', **SWINIR)
    torch.save(network.state_dict(), tmp_path / 'net.pth')
    # BasicSR's own makes a constant of the number of images, so that two of them come out wrong.
    monkeypatch.setattr(deployed, '_window_reverse', swinir_arch.window_reverse)
    with pytest.raises(InputError, match='what torch traces of its SwinIR is right for one image at a time alone'):
        export_onnx(tmp_path / 'net.pth', tmp_path / 'net.onnx')
    assert [path.name for path in tmp_path.iterdir()] == ['net.pth']


def test_mistakes_are_one_sentence_and_leave_files_alone(tmp_path, capsys, monkeypatch):
    save_trained(TRAINED['SPAN'], tmp_path / 'net.pth')
    torch.save(SwinIR(16, upscale=1, ape=True, **SWINIR).state_dict(), tmp_path / 'one_size.pth')
    (tmp_path / 'there.onnx').write_text('mine')
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def error(checkpoint, output):
        assert main(['export', 'onnx', str(tmp_path / checkpoint), '-o', str(tmp_path / output)]) == 2
        return capsys.readouterr().err

    assert 'net.pt must end in .onnx.' in error('net.pth', 'net.pt')
    assert 'there.onnx exists: choose another name' in error('net.pth', 'there.onnx')
    assert 'its SwinIR takes images of one size alone' in error('one_size.pth', 'net.onnx')
    assert 'absent.pth' in error('absent.pth', 'net.onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert 'needs onnxruntime: pip install "lora-sr[onnx]".' in error('net.pth', 'net.onnx')
    with pytest.raises(InputError, match="is 'int8': it must be one of float32, float16"):
        export_onnx(tmp_path / 'net.pth', tmp_path / 'net.onnx', 'int8')
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_overwrite_replaces_the_file(tmp_path):
    save_trained(TRAINED['SPAN'], tmp_path / 'net.pth')
    (tmp_path / 'net.onnx').write_text('mine')
    arguments = ['export', 'onnx', str(tmp_path / 'net.pth'), '-o', str(tmp_path / 'net.onnx'), '--overwrite']
    assert main([*arguments, '--dtype', 'float16']) == 0
    assert metadata(tmp_path / 'net.onnx')['dtype'] == 'float16'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['net.onnx', 'net.pth']
