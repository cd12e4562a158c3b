"""The one way in: whatever a user names gives the network that was meant, or a sentence."""

import sys

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from torch import nn

from lora_sr.adapters import LoRAConfig, add_lora, lora_layers, save_adapter
from lora_sr.archs import SPAN
from lora_sr.checkpoints import Checkpoint, NetworkSource, Origin, load_network, open_network
from lora_sr.checkpoints.building import build_network
from lora_sr.checkpoints.imports import import_modules
from lora_sr.deploy.exports import export_torchscript
from lora_sr.deploy.merge import merge_checkpoint
from lora_sr.errors import InputError

SECTION = {
    'type': 'EDSR',
    'num_in_ch': 3,
    'num_out_ch': 3,
    'num_feat': 16,
    'num_block': 1,
    'upscale': 2,
    'res_scale': 0.1,
}


def edsr():
    torch.manual_seed(0)
    return EDSR(**{key: value for key, value in SECTION.items() if key != 'type'}).eval()


def output(network):
    with torch.no_grad():
        return network(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = edsr()
    torch.save({'params': network.state_dict()}, 'plain.pth')
    torch.save({'params': network.state_dict(), 'lora_sr': Origin(network=SECTION).to_dict()}, 'named.pth')
    (tmp_path / 'edsr.yml').write_text(
        f'network_g: {SECTION}\npath: {{pretrain_network_g: plain.pth, param_key_g: params_ema}}\n'
    )
    return tmp_path


def test_what_no_tensor_shows_comes_from_the_options_or_from_the_file_itself(files):
    expected = output(edsr())
    assert not torch.equal(output(load_network('plain.pth')), expected)  # a res_scale of 1 is guessed
    for source in ('named.pth', NetworkSource('plain.pth', options='edsr.yml'), 'edsr.yml'):
        assert torch.equal(output(load_network(source)), expected)


def test_param_key_counts_however_a_file_is_named(files):
    content = {'params': SPAN(feature_channels=4).state_dict(), 'params_ema': SPAN(feature_channels=4).state_dict()}
    torch.save(content, 'two.pth')
    for source in ('two.pth', NetworkSource('two.pth'), Checkpoint.read('two.pth')):
        for arguments, key in (((), 'params_ema'), (('params',), 'params')):
            found = load_network(source, *arguments).state_dict()
            assert all(torch.equal(value, found[name]) for name, value in content[key].items())


@pytest.mark.parametrize(
    'section',
    [
        {'type': 'SPAN', 'feature_channels': 16, 'upscale': 2, 'deploy': True},
        {'type': 'SPAN', 'num_in_ch': 1, 'num_out_ch': 1, 'feature_channels': 16, 'norm': False},
        {'type': 'LKDN', 'num_feat': 12, 'num_atten': 10, 'num_block': 2, 'upscale': 3, 'conv': 'BSConvU_rep'},
        {'type': 'SPANF', 'feature_channels': 16, 'tail_channels': 12, 'layout': 'PDS', 'deploy': True},
        {'type': 'SPANV2', 'feature_channels': 16},
        {'type': 'DISP', 'feature_channels': 16, 'num_block': 2},
        {'type': 'DSCFFused', 'feature_channels': 16},
        {'type': 'DSCLoRA', 'feature_channels': 16, 'rank': 2, 'alpha': 3},
        SECTION,
    ],
    ids=lambda section: section['type'],
)
def test_a_file_tells_the_section_of_its_network(tmp_path, section):
    network = build_network(section).eval()
    torch.save(network.state_dict(), tmp_path / 'network.pth')
    opened = open_network(tmp_path / 'network.pth')
    if section['type'] == 'EDSR':  # whose residual scale no tensor shows
        assert {**opened.base, 'res_scale': 0.1}.items() >= section.items()
        return
    again = build_network(opened.base).eval()
    again.load_state_dict(network.state_dict(), strict=True)
    image = torch.rand(1, section.get('num_in_ch', 3), 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(image), network(image))


def test_a_live_network_stays_as_it_is(files, tmp_path):
    live = add_lora(SPAN(feature_channels=4, upscale=2, deploy=True), LoRAConfig(['conv_cat'], rank=1)).train()
    nn.init.normal_(dict(lora_layers(live))['conv_cat'].lora_B)
    before = {key: value.clone() for key, value in live.state_dict().items()}
    save_adapter(live, 'a.safetensors')
    merge_checkpoint(live, tmp_path / 'merged.pth')
    export_torchscript(live, tmp_path / 'live.pt')
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert (torch.jit.load('live.pt')(image) - live(image)).abs().max() <= 1e-4 * live(image).abs().max()
    plain = SPAN(feature_channels=4, upscale=2, deploy=True)
    adapted = load_network(NetworkSource(plain, adapters=[('a.safetensors', 1.0)], force=True))
    assert any(True for _ in lora_layers(adapted)) and not any(True for _ in lora_layers(plain))
    assert live.training and all(value.dtype == torch.float32 for value in live.parameters())
    assert all(torch.equal(value, before[key]) for key, value in live.state_dict().items())


def test_networks_that_cannot_be_tried_are_merged_and_say_so(files, tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, y):
            return self.layer(x + y)

    network = add_lora(Pair(), LoRAConfig(['layer'], rank=1))
    report = merge_checkpoint(network, tmp_path / 'pair.pth')
    assert report.difference is None and 'not known which images' in str(report)
    with pytest.raises(InputError, match='Pair cannot be exported: Pair must take one image'):
        export_torchscript(network, tmp_path / 'pair.pt')


def test_part_of_a_file_is_told(files, caplog):
    state = edsr().state_dict()
    torch.save({'params': {key: value for key, value in state.items() if 'body' in key}}, 'part.pth')
    options = f'network_g: {SECTION}\npath: {{pretrain_network_g: part.pth, strict_load_g: false}}\n'
    (files / 'part.yml').write_text(options)
    load_network('part.yml')
    assert (
        'part.pth gives 6 of 12 tensors of EDSR; the others stay random, conv_first.weight among them.' in caplog.text
    )
    torch.save({'params': {'other': torch.zeros(3)}}, 'part.pth')
    with pytest.raises(InputError, match='does not fit EDSR: none of its tensors does'):
        load_network('part.yml')


@pytest.mark.parametrize(
    'source, sentence',
    [
        (NetworkSource(), 'No network is named'),
        ('nested.pth', 'there is one under weights_a and one under weights_b, which the param_key has to name'),
        (
            NetworkSource('plain.pth', imports='my_arch.py'),
            "imports must be a list of modules and .py files, got 'my_arch.py'",
        ),
        (NetworkSource('plain.pth', imports=['tabnanny.py']), 'must have a name of its own'),
        (NetworkSource('plain.pth', imports=['absent.py']), 'There is no file .*absent.py to import'),
        (
            NetworkSource('plain.pth', imports=['exits.py']),
            r'exits.py cannot be imported: SystemExit: 0 \(.*exits.py, line 2\)',
        ),
        (NetworkSource('plain.pth', imports=['loud.py']), r'loud.py cannot be imported: E \(.*loud.py, line 3\)'),
        (NetworkSource('plain.pth', imports=['long.py']), r'ValueError: [x …]{70,80} \(.*long.py, line 1\)\.$'),
        (NetworkSource('plain.pth', imports=['red.py']), r'ValueError: \\x1b\[31mx \(.*red.py, line 1\)'),
        (NetworkSource('plain.pth', imports=['list.yml']), 'list.yml must be a module or a .py file'),
        (NetworkSource('plain.pth', imports=['no.such']), 'The module no.such cannot be imported: ModuleNotFoundError'),
        ('list.yml', 'imports must be a list'),
    ],
)
def test_mistakes(files, monkeypatch, source, sentence):
    monkeypatch.setattr(sys, 'path', [*sys.path])  # which the folder of an imported file joins
    torch.save({'weights_a': edsr().state_dict(), 'weights_b': edsr().state_dict(), 'epoch': 3}, 'nested.pth')
    (files / 'tabnanny.py').write_text('')
    (files / 'exits.py').write_text('\nraise SystemExit(0)\n')
    (files / 'loud.py').write_text('class E(Exception):\n    def __str__(self): raise ValueError\nraise E\n')
    (files / 'long.py').write_text('raise ValueError("x " * 10**5)\n')
    (files / 'red.py').write_text('raise ValueError("\\x1b[31mx\\ny")\n')
    (files / 'list.yml').write_text('imports: my_arch.py\nnetwork_g: {type: SPAN}\n')
    with pytest.raises(InputError, match=sentence):
        open_network(source)


def test_a_module_beside_its_option_file(files, monkeypatch):
    (files / 'inner').mkdir()
    (files / 'inner/beside_it.py').write_text('value = 3\n')
    import_modules(['beside_it.py'], files / 'inner/x.yml')
    import beside_it

    assert beside_it.value == 3
