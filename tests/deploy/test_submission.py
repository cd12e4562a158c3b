"""`lora-sr submission`: the code stands by itself, gives the authors' images, and appears whole or not at all."""

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from torch import nn

from lora_sr import load_network
from lora_sr.adapters import LoRAConfig, add_lora, lora_layers, save_adapter
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.lkdn import LKDN, LKDN_S, BSConvU_idt
from lora_sr.archs.span import SPAN
from lora_sr.archs.spanv2 import SPANV2
from lora_sr.checkpoints.families import family_name
from lora_sr.cli.main import main
from lora_sr.deploy import submission
from lora_sr.deploy.submission import write_submission
from lora_sr.deploy.submitted_networks import class_name_for, write_source
from lora_sr.errors import InputError

LKDN_SIZES = {'num_feat': 6, 'num_atten': 4, 'num_block': 2}


def submitted(folder, stem, class_name):
    """The network of a submission, made without arguments and loaded strictly."""
    namespace = {'__name__': stem}
    exec((folder / f'models/{stem}.py').read_text(), namespace)
    network = namespace[class_name]()
    network.load_state_dict(torch.load(folder / f'model_zoo/{stem}.pth', weights_only=True), strict=True)
    return network.eval()


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}


def save(network, path):
    torch.save({'params': network.state_dict()}, path)
    return path


def with_lora(network):
    add_lora(network, LoRAConfig(['.*conv.*', '.*c1_r.*'], rank=2, alpha=4))
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B.normal_(std=0.05)
    return network


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    return save(SPAN(feature_channels=6, upscale=4, deploy=True), tmp_path / 'span.pth')


@pytest.mark.slow
@torch.no_grad()
def test_the_official_entry_of_the_challenge(shared, tmp_path, capsys):
    folder, weights = tmp_path / 'DSCF', shared / 'weights/DSCLoRA/DSCF_ch26_x4.pth'
    assert main(['submission', '-m', str(weights), '--team', '23', '--name', 'DSCF', '-o', str(folder)]) == 0
    stem = 'team23_DSCF'
    files = [f'models/{stem}.py', f'model_zoo/{stem}.pth', f'{stem}_select_model.txt', f'{stem}_factsheet.md']
    assert everything(tmp_path) == {f'DSCF/{file}' for file in files}

    network = submitted(folder, stem, 'DSCF')
    truth = np.load(shared / 'golden/networks/DSCF_ch26_x4.npz')
    assert np.abs(network(torch.from_numpy(truth['lr'])).numpy() - truth['sr']).max() <= 1e-4
    official = torch.load(weights, weights_only=True, map_location='cpu')
    tensors = network.state_dict()
    assert tensors.keys() == {key.replace('.eval_conv', '') for key in official}
    assert all(torch.equal(tensors[key.replace('.eval_conv', '')], value) for key, value in official.items())
    assert {type(module) for module in network.modules() if not list(module.children())} == {nn.Conv2d, nn.PixelShuffle}

    source = (folder / files[0]).read_text()
    tree = ast.parse(source, feature_version=(3, 7))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == [
        'import torch',
        'from torch import nn',
        'from torch.nn import functional as F',
    ]
    defined = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    assert all(ast.get_docstring(node) for node in defined if getattr(node, 'name', '') != '__init__')
    assert max(map(len, source.splitlines())) <= 120

    published = json.loads((shared / 'reference.json').read_text())['published']['NTIRE efficient SR']['2025']
    entry, factsheet = published['23_DSCF (1st)'], (folder / files[3]).read_text()
    assert f'({entry["params_m"]:.3f} M)' in factsheet and f'| {entry["flops_g"]:.2f} G |' in factsheet
    assert f'| {entry["acts_m"]:.2f} M |' in factsheet and f'| Convolutions | {entry["convs"]} |' in factsheet
    assert hashlib.sha256((folder / files[1]).read_bytes()).hexdigest() in factsheet
    assert 'challenge is x' not in factsheet and 'to the bit' in factsheet

    branch = (folder / files[2]).read_text()
    assert branch in capsys.readouterr().out
    assert branch.splitlines() == [
        '    elif model_id == 23:',
        '        from models.team23_DSCF import DSCF',
        '        name, data_range = f"{model_id:02}_DSCF", 1.0',
        "        model_path = os.path.join('model_zoo', 'team23_DSCF.pth')",
        '        model = DSCF()',
        '        model.load_state_dict(torch.load(model_path), strict=True)',
    ]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    'make',
    [
        lambda: with_lora(SPAN(feature_channels=8, upscale=2)),
        lambda: SPAN(feature_channels=8, upscale=2, norm=False),
        lambda: with_lora(LKDN(**LKDN_SIZES, num_in=1, upscale=3, conv='BSConvU_rep', upsampler='pixelshuffle_rep')),
        lambda: LKDN(**LKDN_SIZES, num_in=2, upscale=4, conv='BSConvU_idt'),
    ],
    ids=['span_lora_on_branches', 'span_without_normalization', 'lkdn_lora_beside_branches', 'lkdn_identity'],
)
def test_trained_forms_are_merged_and_folded(tmp_path, make):
    torch.manual_seed(1)
    trained = make().eval()
    report = write_submission(save(trained, tmp_path / 'net.pth'), tmp_path / 'out', 7, 'Mine-2.0')
    network = submitted(tmp_path / 'out', 'team07_Mine_2_0', 'Mine_2_0')
    assert report.difference <= 1e-6
    image = torch.rand(2, 3, 13, 21, dtype=torch.float64)
    expected = trained.double()(image)
    assert (network.double()(image) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert report.parameters == sum(value.numel() for value in network.parameters())
    convolutions = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: convolutions.append(output.numel()))
    network(torch.rand(1, 3, 256, 256, dtype=torch.float64))
    assert (report.convolutions, report.activations) == (len(convolutions), sum(convolutions))
    source = (tmp_path / 'out/models/team07_Mine_2_0.py').read_text()
    assert ('BSConvU_idt' in source) == any(isinstance(module, BSConvU_idt) for module in trained.modules())
    assert 'rep1x1' not in source and 'sk' not in source.split()
    note = ': the challenge is x4' in (tmp_path / 'out/team07_Mine_2_0_factsheet.md').read_text()
    assert note == (report.scale != 4) and report.scale == trained.upscale


def test_into_a_clone_of_the_organizers_repository(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, '_verify', lambda *_: 0.0)  # it is the files that matter here
    clone = tmp_path / 'clone'
    (clone / 'models').mkdir(parents=True)
    for file in ('test_demo.py', 'models/team00_EFDN.py'):
        (clone / file).write_text('theirs')
    before = everything(clone)
    report = write_submission(checkpoint, clone, 7, 'Mine')
    assert everything(clone) == before | set(report.files)
    assert all((clone / file).read_text() == 'theirs' for file in before)

    (clone / 'models/team07_Mine.py').write_text('edited')
    with pytest.raises(InputError, match=r'models/team07_Mine\.py exists'):
        write_submission(checkpoint, clone, 7, 'Mine')
    assert (clone / 'models/team07_Mine.py').read_text() == 'edited'
    write_submission(checkpoint, clone, 7, 'Mine', overwrite=True)
    assert submitted(clone, 'team07_Mine', 'Mine').upsampler[0].out_channels == 48
    assert everything(clone) == before | set(report.files)


def test_all_of_the_files_or_none(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, '_verify', lambda *_: 0.0)
    clone = tmp_path / 'clone'
    (clone / 'models').mkdir(parents=True)
    (clone / 'models/team07_Mine.py').write_text('former')
    (clone / 'model_zoo').write_text('a file where a folder should be')
    with pytest.raises(InputError, match='cannot be written'):
        write_submission(checkpoint, clone, 7, 'Mine', overwrite=True)
    assert everything(clone) == {'models/team07_Mine.py', 'model_zoo'} and len(list(clone.iterdir())) == 2
    assert (clone / 'models/team07_Mine.py').read_text() == 'former'


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes')
@pytest.mark.parametrize('call', range(1, 5))
def test_a_kill_loses_no_file(tmp_path, monkeypatch, call):
    files = ('models/a.py', 'b.txt')
    for folder, content in (('staging', 'new'), ('clone', 'former')):
        for file in files:
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_text(content)
    process = os.fork()
    if not process:
        calls = []

        def killing(function):
            def wrapped(*arguments):
                function(*arguments)
                calls.append(function)
                if len(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        try:
            for module, name in ((os, 'rename'), (os, 'replace'), (shutil, 'copy2')):
                monkeypatch.setattr(module, name, killing(getattr(module, name)))
            submission._put_in_place(tmp_path / 'staging', tmp_path / 'clone', files, overwrite=True)
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    shutil.rmtree(tmp_path / 'staging')  # as the next run does
    assert {(tmp_path / 'clone' / file).read_text() for file in files} <= {'former', 'new'}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('edit', 'sentence'),
    [
        (
            ('import torch\n', 'import torch\nimport lora_sr\n'),
            'does not run by itself: ImportError: it imports lora_sr',
        ),
        (('- 0.5', '- 0.4'), 'differ by'),
        (('self.block_3 =', 'self.block3 ='), 'does not run by itself: .*block_3'),
    ],
    ids=['import', 'result', 'names'],
)
def test_a_file_that_is_wrong_does_not_appear(checkpoint, tmp_path, monkeypatch, edit, sentence):
    write = submission.write_source
    monkeypatch.setattr(submission, 'write_source', lambda *arguments: write(*arguments).replace(*edit))
    with pytest.raises(InputError, match=sentence) as error:
        write_submission(checkpoint, tmp_path / 'out', 7, 'Mine')
    assert len(str(error.value).splitlines()) == 1
    assert everything(tmp_path) == {'span.pth'} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_weights_that_are_nan_are_not_handed_in(tmp_path):
    network = SPAN(feature_channels=4, deploy=True)
    nn.init.constant_(network.conv_cat.bias, torch.nan)
    with pytest.raises(InputError, match='not finite'):
        write_submission(save(network, tmp_path / 'nan.pth'), tmp_path / 'out', 7, 'Mine')
    assert everything(tmp_path) == {'nan.pth'}


def test_other_networks_are_refused(tmp_path):
    edsr = EDSR(3, 3, num_feat=8, num_block=1)
    torch.save({'a.weight': torch.zeros(3)}, tmp_path / 'other.pth')
    save_adapter(with_lora(SPAN(feature_channels=4)), tmp_path / 'adapter.safetensors')
    for file, sentence in (
        (
            save(edsr, tmp_path / 'edsr.pth'),
            'EDSR cannot be submitted: its module must import torch alone, got an import of basicsr.archs.arch_util',
        ),
        (
            save(SPANV2(feature_channels=4), tmp_path / 'spanv2.pth'),
            'spanv2.pth cannot be submitted: its network must be SPAN, LKDN or one of your own, got SPANV2',
        ),
        (tmp_path / 'other.pth', 'belongs to no network known here'),
        (tmp_path / 'adapter.safetensors', 'is an adapter, not a network'),
        (tmp_path / 'absent.pth', 'cannot be read'),
    ):
        with pytest.raises(InputError, match=sentence):
            write_submission(file, tmp_path / 'out', 7, 'Mine')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('team', 'name', 'output', 'sentence'),
    [
        ('0', 'Mine', 'out', 'team number 0 should be between 1 and 999'),
        ('1000', 'Mine', 'out', 'team number 1000'),
        ('7', '../Mine', 'out', "name '../Mine' should be"),
        ('7', 'a"b', 'out', 'should be up to 40'),
        ('7', 'é', 'out', 'should be up to 40'),
        ('7', 'x' * 41, 'out', 'should be up to 40'),
        ('7', 'Mine', 'span.pth', 'span.pth is a file'),
        ('7', 'Mine', 'absent/out', 'absent of the output does not exist'),
    ],
)
def test_wrong_arguments(checkpoint, tmp_path, capsys, team, name, output, sentence):
    arguments = ['-m', str(checkpoint), '--team', team, '--name', name, '-o', str(tmp_path / output)]
    assert main(['submission', *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert everything(tmp_path) == {'span.pth'}


@pytest.mark.parametrize('link', [os.symlink, os.link])
def test_the_checkpoint_is_not_replaced(checkpoint, tmp_path, capsys, link):
    (tmp_path / 'out' / 'model_zoo').mkdir(parents=True)
    link(checkpoint, tmp_path / 'out/model_zoo/team07_Mine.pth')
    before = checkpoint.read_bytes()
    arguments = ['-m', str(checkpoint), '--team', '7', '--name', 'Mine', '-o', str(tmp_path / 'out'), '--overwrite']
    assert main(['submission', *arguments]) == 2
    assert 'which would be lost: choose another output' in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ('name', 'class_name'),
    [
        ('DSCF', 'DSCF'),
        ('SPAN', 'SPAN'),
        ('LKDN-S', 'LKDN_S'),
        ('4x', '_4x'),
        ('SPAB', 'SPAB_'),
        ('torch', 'torch_'),
        ('model', 'model_'),
        ('class', 'class_'),
        ('super', 'super_'),
    ],
)
def test_names_of_classes(name, class_name):
    assert class_name_for(write_source(SPAN(feature_channels=4, deploy=True), '', '_'), name) == class_name


def test_lkdn_s_is_told_by_its_sizes():
    assert family_name(LKDN_S(upscale=3)) == 'LKDN-S' and family_name(LKDN(num_block=5)) == 'LKDN'
    assert family_name(DSCLoRA(feature_channels=4)) == 'SPAN'


@pytest.mark.slow
def test_the_code_runs_without_anything_but_torch(checkpoint, tmp_path):
    write_submission(checkpoint, tmp_path / 'out', 7, 'Mine')
    torch.manual_seed(0)
    image = torch.rand(1, 3, 11, 15)
    program = (
        'import sys\n'
        "for name in ('numpy', 'basicsr', 'lora_sr', 'safetensors', 'cv2', 'PIL'):\n"
        '    sys.modules[name] = None\n'  # importing it fails then
        f'sys.path.insert(0, {str(tmp_path / "out" / "models")!r})\n'
        'import torch, team07_Mine\n'
        'network = team07_Mine.Mine()\n'
        f'network.load_state_dict(torch.load({str(tmp_path / "out/model_zoo/team07_Mine.pth")!r}))\n'
        'torch.manual_seed(0)\n'
        f'torch.save(network(torch.rand(1, 3, 11, 15)).detach(), {str(tmp_path / "result.pt")!r})\n'
    )
    subprocess.run([sys.executable, '-I', '-B', '-W', 'ignore', '-c', program], check=True)
    with torch.no_grad():
        expected = load_network(checkpoint)(image)
    assert (torch.load(tmp_path / 'result.pt') - expected).abs().max() <= 1e-6 * expected.abs().max()
