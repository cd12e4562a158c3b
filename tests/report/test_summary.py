"""`lora-sr inspect CHECKPOINT`: what is told of every kind of file, and that the commands it names do what they say."""

import json
import shlex

import pytest
import torch
from basicsr.archs import build_network
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.ridnet_arch import RIDNet
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.archs.swinir_arch import SwinIR
from torch import nn

from lora_sr.adapters import LoRAConfig, add_lora, remove_lora, save_adapter
from lora_sr.archs import DISP, LKDN, LKDN_S, SPAN, SPANF, SPANV2, DSCFFused, DSCLoRA
from lora_sr.cli.main import build_parser, main
from lora_sr.report.summary import summarize_checkpoint

LKDN_SIZES = {'num_feat': 6, 'num_atten': 4, 'num_block': 3, 'num_in': 2}
PLAIN = 'plain: a base, or merged, which cannot be told apart'
SWINIR = {
    'img_size': 8,
    'window_size': 4,
    'depths': [2, 2, 2],
    'embed_dim': 6,
    'num_heads': [2, 2, 2],
    'mlp_ratio': 2,
    'upsampler': 'pixelshuffledirect',
}


def save(content, path):
    torch.save({'params': content.state_dict()} if isinstance(content, nn.Module) else content, path)
    return path


def words(command):
    """The arguments behind `lora-sr`, as a shell gives them."""
    program, *arguments = shlex.split(command)
    assert program == 'lora-sr'
    return arguments


def lora(network, **config):
    return add_lora(network, LoRAConfig(**{'groups': ['conv'], 'rank': 2, **config}))


@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (
            lambda: SPAN(feature_channels=6, upscale=3, deploy=True),
            ('SPAN', PLAIN, 'x3', '3 in, 3 out, 6 wide', '6 SPAB', None),
        ),
        (
            lambda: add_lora(SPAN(feature_channels=6, upscale=2, deploy=True), LoRAConfig(target_parameters=['.*'])),
            (
                'AdaptSR on SPAN',
                'adapted: a base with deltas beside it',
                'x2',
                '3 in, 3 out, 6 wide',
                '6 SPAB',
                'deltas of 44 parameters',
            ),
        ),
        (
            lambda: SPAN(feature_channels=6, upscale=2),
            ('SPAN', 'training form: 20 modules have branches', 'x2', '3 in, 3 out, 6 wide', '6 SPAB', None),
        ),
        (
            lambda: SPANF(feature_channels=6, upscale=2),
            ('SPANF', 'training form: 16 modules have branches', 'x2', '3 in, 3 out, 6 wide', '4 SPAB', None),
        ),
        (lambda: SPANV2(feature_channels=6), ('SPANV2', PLAIN, 'x4', '3 in, 3 out, 6 wide', '5 SPABV2', None)),
        (lambda: DISP(feature_channels=6), ('DISP', PLAIN, 'x4', '3 in, 3 out, 6 wide', '4 REECB', None)),
        (lambda: DSCFFused(feature_channels=6), ('DSCFFused', PLAIN, 'x4', '3 in, 3 out, 6 wide', '5 SPAB', None)),
        (
            lambda: DSCLoRA(feature_channels=6, upscale=4, rank=2, alpha=4, rank_pattern={'conv_2.*': 3}),
            (
                'DSCLoRA, i.e. ConvLoRA on SPAN',
                'adapted: a base with LoRA beside it',
                'x4',
                '3 in, 3 out, 6 wide',
                '6 SPAB',
                '20 layers, ranks 2 (19 layers), 3 (1 layer), alpha 4',
            ),
        ),
        (
            lambda: lora(LKDN(**LKDN_SIZES, upscale=2, conv='BSConvU_rep'), also_train=['norm']),
            (
                'AdaptSR on LKDN',
                'adapted: a base with LoRA beside it; training form: 9 modules have branches',
                'x2',
                '3 in, 3 out, 6 wide',
                '3 LKDB',
                ' layers, rank 2, alpha 2; deltas of 6 parameters',
            ),
        ),
        (lambda: LKDN_S(upscale=3), ('LKDN-S', PLAIN, 'x3', '3 in, 3 out, 42 wide', '5 LKDB', None)),
        (
            lambda: lora(SwinIR(upscale=2, **SWINIR), groups=['attention']),
            ('AdaptSR on SwinIR', 'adapted', 'x2', '3 in, 3 out, 6 wide', '3 RSTB', '12 layers, rank 2, alpha 2'),
        ),
        (
            lambda: RRDBNet(3, 3, scale=2, num_feat=16, num_block=2, num_grow_ch=4),
            ('RRDBNet', PLAIN, 'x2', '3 in, 3 out, 16 wide', '2 RRDB', None),
        ),
        (
            lambda: RCAN(3, 3, num_feat=16, num_group=2, num_block=4, upscale=3),
            ('RCAN', PLAIN, 'x3', '3 in, 3 out, 16 wide', '2 ResidualGroup', None),
        ),
        (
            lambda: SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4),
            ('SRVGGNetCompact', PLAIN, 'x4', '3 in, 3 out, 8 wide', None, None),
        ),
        # Its first convolution shifts the mean, from 3 channels to 3.
        (lambda: RIDNet(3, 16, 3, num_block=2), ('RIDNet', PLAIN, 'x1', '3 in, 3 out, 16 wide', '2 EAM', None)),
    ],
    ids=[
        'span',
        'span_deltas',
        'span_branches',
        'spanf_branches',
        'spanv2',
        'disp',
        'dscf_fused',
        'dsclora',
        'lkdn_lora_branches',
        'lkdn_s',
        'swinir_lora',
        'rrdbnet',
        'rcan',
        'srvgg',
        'ridnet',
    ],
)
def test_networks(tmp_path, make, expected):
    network = make()
    file = save(network, tmp_path / 'a net=1.pth')
    summary = summarize_checkpoint(file)
    rows = summary.rows
    family, form, scale, channels, blocks, updates = expected
    assert (rows['family'], rows['scale'], rows['channels'], rows.get('blocks')) == (family, scale, channels, blocks)
    assert rows['form'].startswith(form)
    assert rows['LoRA'].endswith(updates) if updates else 'LoRA' not in rows
    parameters = dict(network.named_parameters())
    added = sum(value.numel() for key, value in parameters.items() if '.lora_' in key)
    total = sum(value.numel() for value in parameters.values())
    assert rows['parameters'].startswith(f'{total:,}, of which {added:,} are updates' if added else f'{total:,}')
    assert rows['state dicts'] == f'params ({len(network.state_dict())} tensors)'
    assert rows['iteration'].startswith('unknown')

    commands = [words(command) for command in summary.commands]
    verbs = [' '.join(arguments[: 2 if arguments[0] in ('export', 'adapter') else 1]) for arguments in commands]
    if added or 'branches' in rows['form']:
        assert verbs == ['merge', 'adapter extract'][: 2 if added else 1]
    else:
        ours = isinstance(network, (SPAN, LKDN))
        known = isinstance(network, (SPAN, SwinIR, SRVGGNetCompact))
        assert verbs == [
            'upscale',
            *([] if isinstance(network, RIDNet) else ['compare']),
            *(['submission'] if ours else []),
            'export onnx',
            *(['export chainner'] if known else []),
        ]
    for arguments in commands:
        parsed = vars(build_parser().parse_args([word.replace('N', '7') for word in arguments]))
        assert str(file) in str(parsed)  # the file's name, with its blank, is one argument


@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (lambda: SwinIR(upscale=2, ape=True, **SWINIR), []),
        (lambda: SRVGGNetCompact(1, 1, 8, 1, 2), ['upscale', 'export onnx', 'export chainner']),
        (lambda: SRVGGNetCompact(3, 3, 8, 1, 2, 'relu'), ['upscale', 'compare', 'export onnx']),
        (lambda: RRDBNet(3, 3, 2, 8, 1, num_grow_ch=32), ['upscale', 'compare', 'export onnx', 'export chainner']),
    ],
    ids=['one_size', 'gray', 'relu', 'growth'],
)
def test_commands_are_those_that_take_the_network(tmp_path, make, expected):
    commands = list(map(words, summarize_checkpoint(save(make(), tmp_path / 'net.pth')).commands))
    assert [' '.join(command[: 1 + (command[0] == 'export')]) for command in commands] == expected


def test_merge_and_extract_as_they_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = DSCLoRA(feature_channels=6)
    file = save(network, tmp_path / 'net_g_20.pth')
    for command in summarize_checkpoint(file).commands:
        assert main(words(command)) == 0
    merged = summarize_checkpoint(tmp_path / 'net_g_20_merged.pth')
    assert merged.rows['family'] == 'SPAN' and merged.rows['form'] == PLAIN

    adapter = summarize_checkpoint(tmp_path / 'net_g_20.safetensors')
    assert adapter.network is None and adapter.rows['form'].startswith('adapter only')
    assert adapter.rows['LoRA'] == '20 layers, rank 8, alpha 16'
    on_base, info = adapter.commands
    on_base = on_base.replace('-o ', '-o again_')
    save(remove_lora(network), tmp_path / 'BASE.pth')
    assert main(words(on_base)) == 0
    capsys.readouterr()
    assert main(words(on_base.replace('BASE.pth', 'net_g_20_merged.pth').replace('again', 'twice'))) == 2
    assert 'carries the adapter' in capsys.readouterr().err
    capsys.readouterr()
    assert main(words(info)) == 0
    parameters = adapter.rows['parameters']
    assert f'20 layers with LoRA, {parameters} parameters' in capsys.readouterr().out


def test_the_summary_comes_before_the_table(tmp_path, capsys):
    assert main(['inspect', str(save(SPAN(feature_channels=6, deploy=True), tmp_path / 'net.pth'))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(', ')[0].split() == ['file', str(tmp_path / 'net.pth')]
    table = next(index for index, line in enumerate(lines) if line.startswith('layer '))
    assert lines[1] == 'family       SPAN' and not lines[table - 1]
    commands = lines.index(next(line for line in lines if line.startswith('next')))
    assert all(line[13:].startswith('lora-sr ') for line in lines[commands : table - 1])
    assert lines[-1].endswith('parameters train (100.0%)')


def test_official_files(shared):
    reference = json.loads((shared / 'reference.json').read_text())['measured_with_official_code']
    families = {'LKDN_x4': 'LKDN', 'LKDN-S_x4': 'LKDN-S', 'LKDN-S_del_rep_x4': 'LKDN-S'}
    families.update(team01_PDS='SPANF', team15_DSCF_Fused='DSCFFused', team16_PKDSR='SPANF', team18_DISP='DISP')
    families.update(team22_spanv2_c2='SPANV2')
    for name, published in reference.items():
        if isinstance(published, dict) and 'weights' in published:
            rows = summarize_checkpoint(shared / published['weights']).rows
            assert rows['family'] == families.get(name, 'SPAN')
            assert rows['parameters'] == f'{published["params"]:,}' and rows['scale'] == 'x4'
            if name == 'LKDN-S_x4':
                assert rows['state dicts'] == 'params (196 tensors), params_ema (196 tensors; this one is read)'


def test_iterations(tmp_path):
    network = SPAN(feature_channels=4, deploy=True)
    models, states = tmp_path / 'run/models', tmp_path / 'run/training_states'
    models.mkdir(parents=True)
    for name in ('net_g_5000', 'net_g_latest', 'SPAN_x4'):
        save(network, models / f'{name}.pth')

    def iteration(name):
        return summarize_checkpoint(models / f'{name}.pth').rows['iteration']

    assert iteration('net_g_5000') == '5,000, by its name' and iteration('net_g_latest') == 'the last of its run'
    assert iteration('SPAN_x4').startswith('unknown')
    states.mkdir()
    for number in (900, 5000):
        save({'epoch': 3, 'iter': number, 'optimizers': [], 'schedulers': []}, states / f'{number}.state')
    assert iteration('net_g_5000') == '5,000, by its name; its training state is there, to go on from'
    assert iteration('net_g_latest') == 'the last of its run, whose last training state is of 5,000'
    save({'params': network.state_dict(), 'iter': 70}, models / 'other.pth')
    assert iteration('other') == '70, as the file says'


def test_training_states(tmp_path):
    network = nn.Linear(3, 5)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    values = 2 * 20 + 2  # two moments of each parameter, and a counter of each of the two tensors
    (tmp_path / 'run/models').mkdir(parents=True)
    (tmp_path / 'run/training_states').mkdir()
    content = {'epoch': 3, 'iter': 1200, 'optimizers': [optimizer.state_dict()], 'schedulers': []}
    state = save(content, tmp_path / 'run/training_states/1200.state')
    summary = summarize_checkpoint(state)
    assert summary.rows['form'].startswith('training state of a run')
    assert summary.rows['optimizers'] == f'1, {values} values' and summary.rows['iteration'] == '1,200, epoch 3'
    assert summary.commands == ['lora-sr train -opt OPTION_FILE --auto_resume']
    save(SPAN(feature_channels=4, deploy=True), tmp_path / 'run/models/net_g_1200.pth')
    assert main(words(summarize_checkpoint(state).commands[0])) == 0

    for iteration in (None, 'x', [3]):  # of a file that is no run's
        odd = summarize_checkpoint(save({**content, 'iter': iteration}, tmp_path / 'odd.state'))
        assert 'iteration' not in odd.rows and odd.rows['optimizers'] == f'1, {values} values'
    alone = summarize_checkpoint(save(optimizer.state_dict(), tmp_path / 'optimizer.pth'))
    assert alone.rows['form'].startswith('state of an optimizer') and alone.rows['optimizers'] == f'1, {values} values'
    assert alone.commands == []


@pytest.mark.parametrize(
    'content',
    [
        *(
            {'optimizers': [one]}
            for one in (3, None, [1], {'state': 5}, {'state': None}, {'state': [1]}, {'state': {0: 5}})
        ),
        {'optimizers': [{'state': {0: [torch.ones(2)]}}]},
        {'state': 5, 'param_groups': 6},
        {'state': None, 'param_groups': None},
        {'optimizers': [], 'iter': 5, 'epoch': '\x1b[31m\nx'},
        {'optimizers': [], 'iter': 5, 'epoch': 'x' * 10**6},
        {'optimizers': [], 'iter': 5, 'epoch': {index: index for index in range(10**4)}},
        {'optimizers': [], 'iter': 10**600, 'epoch': -(10**600)},
        {'optimizers': [{'state': {0: {'a': torch.zeros(3).to_sparse()}}}]},
    ],
)
def test_training_states_may_hold_anything(tmp_path, capsys, content):
    assert_short(capsys, save(content, tmp_path / 'odd.state'))


@pytest.mark.parametrize(
    'content',
    [
        {**{f'extra{index}': index for index in range(20000)}, 'params': {'a': torch.ones(1)}},
        {f'dict{index}' + 'x' * 400: {'a': torch.ones(1)} for index in range(5000)},
        {'params': {letter * 512: torch.ones([1] * 500) for letter in 'abcdefghijkl'}},
        {'a': torch.ones(1), 'lora_sr': {'run': '\x1b[31m\n' * 999, 'adapters': ['a' * 64] * 20000}},
        {'params': {'a': torch.ones(1)}, 'lora_sr': {'adapters': ['\x1b' * 10**6] * 9, 'version': 'x' * 10**6}},
        {
            f'{index}.{name}': torch.ones(size)
            for index in range(60)
            for name, size in (('lora_A', (index + 1, 2)), ('lora_B', (2, index + 1)), ('lora_alpha', ()))
        },
    ],
)
def test_what_is_told_of_a_file_is_short(tmp_path, capsys, content):
    assert_short(capsys, save(content, tmp_path / 'odd.pth'))


def assert_short(capsys, file):
    status = main(['inspect', str(file)])
    output = capsys.readouterr()
    assert status == 0 or 'holds no state dict' in output.err
    lines = output.out.splitlines()
    assert all(line.isprintable() and len(line) < 700 for line in lines) and len(lines) < 30


@pytest.mark.parametrize(
    'section',
    [
        {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 2},
        {'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 2},
        {'type': 'StyleGAN2Discriminator', 'out_size': 8, 'channel_multiplier': 0.125},
    ],
    ids=lambda section: section['type'],
)
def test_discriminators(tmp_path, section):
    network = build_network(section)
    summary = summarize_checkpoint(save(network, tmp_path / 'net_d_10.pth'))
    assert summary.rows['family'] == f'{section["type"]}, a discriminator' and summary.commands == []
    assert summary.rows['iteration'] == '10, by its name'
    generator = save(SPAN(feature_channels=4, deploy=True), tmp_path / 'net_g_10.pth')
    assert summarize_checkpoint(tmp_path / 'net_d_10.pth').commands == [f'lora-sr inspect {generator}']
    renamed = summarize_checkpoint((tmp_path / 'net_d_10.pth').rename(tmp_path / 'mine.pth'))
    assert renamed.rows['family'] == summary.rows['family']


def test_unknown_networks(tmp_path, capsys):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Linear(5, 2))
    summary = summarize_checkpoint(save({'model': network.state_dict(), 'epoch': 3}, tmp_path / 'net.pth'))
    assert summary.network is None and summary.commands == []
    ours = 'DSCLoRA, SPAN, LKDN, SPANF, SPANV2, DISP, DSCFFused'
    assert summary.rows['family'].startswith(f'none of those known here ({ours}, SwinIR')
    assert summary.rows['form'] == 'no LoRA' and summary.rows['values'] == str(3 * 4 * 9 + 4 + 20 + 5 + 10 + 2)
    assert summary.rows['state dicts'] == 'model (6 tensors); beside epoch'
    assert summary.rows['tensors'].splitlines()[:2] == ['0.weight  4x3x3x3', '0.bias  4']

    add_lora(network, LoRAConfig(['0', '2'], rank=2))
    adapted = summarize_checkpoint(save({'model': network.state_dict()}, tmp_path / 'net.pth'))
    assert adapted.rows['LoRA'] == '2 layers, rank 2, alpha 2'
    assert adapted.rows['tensors'].splitlines()[-1] == f'… and {len(network.state_dict()) - 8} more'
    for command in adapted.commands:
        assert main([*words(command)[:-1], str(tmp_path / words(command)[-1])]) == 0
    assert (tmp_path / 'net_merged.pth').is_file() and (tmp_path / 'net.safetensors').is_file()

    state = {key: value for key, value in network.state_dict().items() if key != '0.lora_B'}
    assert 'lacks lora_B' in summarize_checkpoint(save(state, tmp_path / 'half.pth')).rows['LoRA']

    state = SPAN(feature_channels=4, deploy=True).state_dict()
    del state['block_3.c1_r.eval_conv.bias']
    rows = summarize_checkpoint(save(state, tmp_path / 'part.pth')).rows
    assert rows['family'].startswith('looks like SPAN, but') and 'block_3.c1_r.eval_conv.bias' in rows['family']


def test_lora_tensors_that_are_no_adapter_file(tmp_path):
    save_adapter(DSCLoRA(feature_channels=6), tmp_path / 'adapter.safetensors')
    state = DSCLoRA(feature_channels=6).state_dict()
    file = save({key: value for key, value in state.items() if '.lora_' in key}, tmp_path / 'lora.pth')
    summary = summarize_checkpoint(file)
    assert 'no adapter file' in summary.rows['form'] and summary.commands == []


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    (tmp_path / 'text.pth').write_text('no checkpoint')
    save({'epoch': 3}, tmp_path / 'numbers.pth')
    for name in ('text.pth', 'numbers.pth', 'absent.pth'):
        assert main(['inspect', str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert name in error and len(error.splitlines()) == 1
