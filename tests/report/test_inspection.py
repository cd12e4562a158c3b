"""`lora-sr inspect`: against the published counts, and against the networks' own parameters."""

import itertools
import re

import pytest
import torch
from basicsr.archs import build_network
from torch import nn

import lora_sr
from lora_sr.adapters import LoRAConfig, add_lora, mark_trainable
from lora_sr.checkpoints.networks import network_of_options
from lora_sr.cli.main import main
from lora_sr.report.inspection import fold_rows, format_inspection, inspect_network

SWINIR = """\
  base:
    {type: SwinIR, upscale: 4, img_size: 48, window_size: 8, depths: [6, 6, 6, 6, 6, 6], embed_dim: 180,
     num_heads: [6, 6, 6, 6, 6, 6], mlp_ratio: 2, upsampler: pixelshuffle, resi_connection: 1conv}
"""
RRDBNET = '  base: {type: RRDBNet, num_in_ch: 3, num_out_ch: 3, num_feat: 64, num_block: 23, num_grow_ch: 32}\n'
TINY_SWINIR = {
    'type': 'SwinIR',
    'upscale': 2,
    'img_size': 8,
    'window_size': 4,
    'depths': [2, 2],
    'embed_dim': 6,
    'num_heads': [2, 2],
    'mlp_ratio': 2,
    'upsampler': 'pixelshuffledirect',
}


def option_file(folder, base, lora):
    file = folder / 'options.yml'
    file.write_text(f'scale: 4\nnetwork_g:\n  type: AdaptSR\n{base}  lora: {lora}\n')
    return file


def adapted_swinir(**config):
    torch.manual_seed(0)
    network = add_lora(build_network(dict(TINY_SWINIR)), LoRAConfig(**config))
    mark_trainable(network)
    return network


def spelled_out(name):
    """All names that a folded one stands for."""
    parts = []
    for text in re.split(r'(\{[^}]*\})', name):
        if not text.startswith('{'):
            parts.append([text])
            continue
        numbers = []
        for piece in text[1:-1].split(','):
            first, _, last = piece.partition('-')
            numbers += range(int(first), int(last or first) + 1)
        parts.append(list(map(str, numbers)))
    return {''.join(choice) for choice in itertools.product(*parts)}


@pytest.mark.parametrize(
    ('base', 'rank', 'total'),
    [
        (SWINIR, 8, '885,168 of 11,900,199 parameters train (7.4%)'),
        (RRDBNET, 8, '4,179,888 of 16,697,987 parameters train (25.0%)'),
        (RRDBNET, 2, '1,044,972 of 16,697,987 parameters train (6.3%)'),
    ],
    ids=['swinir', 'rrdbnet', 'rrdbnet_rank2'],
)
def test_published_counts(tmp_path, capsys, base, rank, total):
    assert main(['inspect', str(option_file(tmp_path, base, f'{{groups: [all], rank: {rank}}}'))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == total
    if base is SWINIR:
        qkv = next(line.split() for line in lines if '.attn.qkv ' in line)
        # 36 layers of (540 * 180 + 540), with 36 * 8 * (540 + 180) parameters of LoRA
        assert qkv == [
            *('layers.{0-5}.residual_group.blocks.{0-5}.attn.qkv', 'x36', 'attention', '540x180', '8'),
            *('3,518,640', '207,360', '5.9%', '1.74%'),
        ]


def test_every_line_is_that_of_its_layer():
    network = adapted_swinir(groups=['attention', 'conv'], rank=2, also_train=['bias', 'norm', 'position'])
    inspection = inspect_network(network)
    rows = {row.name: row for row in inspection.rows}
    assert len(rows) == len(inspection.rows)
    parameters = dict(network.named_parameters())
    counted = 0
    for name, row in rows.items():
        own, _, last = name.rpartition('.')
        if f'{own}.lora_shift_{last}' in parameters:
            delta = parameters[f'{own}.lora_shift_{last}']
            assert row.shape == tuple(delta.shape) and row.rank is None
            assert row.parameters == row.trainable == delta.numel()
            expected = {'relative_position_bias_table': 'position'}.get(last, 'norm' if 'norm' in own else 'bias')
            assert row.kind == expected
            counted += row.trainable
            continue
        assert row.shape == tuple(parameters[f'{name}.weight'].shape)
        lora = [parameters[key].numel() for key in (f'{name}.lora_A', f'{name}.lora_B') if key in parameters]
        assert row.trainable == sum(lora) and row.rank == (2 if lora else None)
        has_bias = f'{name}.bias' in parameters and f'{name}.lora_shift_bias' not in parameters
        bias = parameters[f'{name}.bias'].numel() if has_bias else 0
        assert row.parameters == parameters[f'{name}.weight'].numel() + bias
        counted += row.trainable
    plain = build_network(dict(TINY_SWINIR))
    assert inspection.base == sum(value.numel() for value in plain.parameters())
    assert sum(row.parameters for row in inspection.rows) == inspection.base  # with deltas there are no others
    assert inspection.trainable == counted == sum(value.numel() for value in parameters.values() if value.requires_grad)
    assert rows['layers.1.residual_group.blocks.0.mlp.fc1'].rank is None


def test_folded_lines_stand_for_exactly_the_layers():
    # Equal shapes, but ranks that follow no pattern.
    ranks = {r'layers\.0.*blocks\.0.*proj': 1, r'layers\.1.*blocks\.1.*': 3, r'.*blocks\.1\.mlp\.fc1': 0}
    network = adapted_swinir(groups=['all'], rank=2, rank_pattern=ranks, also_train=['norm'])
    rows = inspect_network(network).rows
    folded = fold_rows(rows)
    by_name = {row.name: row for row in rows}
    seen = [name for row in folded for name in spelled_out(row.name)]
    assert sorted(seen) == sorted(by_name) and len(folded) < len(rows)
    for row in folded:
        members = [by_name[name] for name in spelled_out(row.name)]
        assert row.layers == len(members)
        assert row.trainable == sum(member.trainable for member in members)
        assert row.parameters == sum(member.parameters for member in members)
        assert {(member.kind, member.shape, member.rank) for member in members} == {(row.kind, row.shape, row.rank)}
    first = [min(list(by_name).index(name) for name in spelled_out(row.name)) for row in folded]
    assert first == sorted(first)


def test_ranks_that_are_too_large_are_marked(tmp_path):
    text = format_inspection(inspect_network(lora_lkdn(groups=['all'], rank=8)))
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    # 16 kernels of 9 or of 25 values: 25 * rank and 41 * rank against 144 and 400 parameters.
    assert ' 8* ' in rows['fea_conv.dw'] and ' 8 ' in rows['B{1-2}.atten.depthwise']
    note = next(line for line in text.splitlines() if 'up to rank 5 it has not' in line)
    assert 'fea_conv.dw, ' in note and 'atten' not in note
    # 8 -> 8 channels: 16 * rank against 64 parameters, so that rank 4 is the last that is no larger, and 8 is full.
    small = add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoRAConfig(['0'], rank=5))
    assert 'up to rank 4 it has not: 0' in format_inspection(inspect_network(small))
    assert '*' not in format_inspection(
        inspect_network(add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoRAConfig(['0'], rank=4)))
    )


def lora_lkdn(**config):
    section = {'type': 'LKDN', 'num_feat': 16, 'num_atten': 16, 'num_block': 2, 'num_in': 2, 'upscale': 2}
    network = add_lora(build_network(section), LoRAConfig(**config))
    mark_trainable(network)
    return network


def test_a_plain_network_shows_its_groups(tmp_path, capsys):
    file = tmp_path / 'plain.yml'
    file.write_text('network_g: {type: MSRResNet, num_feat: 4, num_block: 2, upscale: 2}\n')
    assert main(['inspect', str(file), '--all']) == 0
    lines = capsys.readouterr().out.splitlines()
    network = build_network({'type': 'MSRResNet', 'num_feat': 4, 'num_block': 2, 'upscale': 2})
    total = sum(value.numel() for value in network.parameters())
    assert lines[-1] == f'{total:,} of {total:,} parameters train (100.0%)'
    cells = [line.split() for line in lines]
    assert ['body.1.conv2', 'conv', '4x4x3x3', '-', '148', '148', '100.0%', f'{148 / total:.2%}'] in cells
    upsampler = [name for name, _ in network.named_parameters() if name.startswith(('upconv', 'conv_hr', 'conv_last'))]
    count = sum(network.get_parameter(name).numel() for name in upsampler)
    assert ['upsampler', f'{len(upsampler) // 2}', f'{count}', f'{count}', f'{count / total:.2%}'] in cells


def test_a_checkpoint_with_lora(tmp_path):
    network = lora_lkdn(groups=['attention'], rank=3)
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    inspection = inspect_network(lora_sr.load_network(tmp_path / 'net.pth'))
    assert inspection == inspect_network(network)
    assert {row.kind for row in inspection.rows if row.rank == 3} == {'attention'}


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('name: x\n', 'has no network_g'),
        ('network_g: {type: SwinIRR}\n', "there is no network 'SwinIRR'; did you mean SwinIR"),
        ('network_g: {type: AdaptSR, base: {type: MSRResNet}, lora: {groups: [atention]}}\n', '"attention"'),
    ],
)
def test_wrong_option_files(tmp_path, capsys, text, sentence):
    file = tmp_path / 'wrong.yml'
    file.write_text(text)
    assert main(['inspect', str(file)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_no_weights_and_no_data_are_needed(tmp_path):
    file = tmp_path / 'options.yml'
    file.write_text(
        'network_g: {type: MSRResNet, num_feat: 4, num_block: 1, upscale: 2}\n'
        'path: {pretrain_network_g: nowhere.pth}\ndatasets: {train: {dataroot_gt: nowhere}}\nscale: 2\n'
    )
    assert len(inspect_network(network_of_options(file)).rows) == 6


def test_a_network_without_parameters():
    assert '0 of 0 parameters train (0.0%)' in format_inspection(inspect_network(nn.Upsample(scale_factor=2)))
