"""`lora-sr allocate` on tiny runs: the gradients against plain autograd, the new file against the old one."""

import copy
import difflib
import logging
import re

import pytest
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.models import build_model
from basicsr.utils import logger as basicsr_logger
from tiny_run import TINY_OPTIONS, run_python
from torch.nn import functional as F

from lora_sr.adapters import LoRAConfig, add_lora, layer_groups
from lora_sr.adapters.allocation import base_weight
from lora_sr.basicsr.options import check_options
from lora_sr.basicsr.rank_allocation import Allocation, format_ranks, measure_gradients, plot_ranks, write_ranks
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.cli.main import main
from lora_sr.errors import InputError
from lora_sr.option_file import load_options

BASE = {'type': 'MSRResNet', 'num_feat': 8, 'num_block': 2, 'upscale': 2}
NETWORK = """\
network_g:
  type: AdaptSR  # the wrapper
  base: {type: MSRResNet, num_feat: 8, num_block: 2, upscale: 2}
  lora:
    groups: [conv, upsampler]  # by purpose
    exclude_modules: [conv_first]
    rank: 2  # everywhere

    # How strong it is:
    alpha: 2
"""
TARGETS = ['body.0.conv1', 'body.0.conv2', 'body.1.conv1', 'body.1.conv2', 'upconv1', 'conv_hr', 'conv_last']


@pytest.fixture
def options(pairs, tmp_path, tmp_path_factory, monkeypatch):
    """An option file with an AdaptSR network, in the folder to run in."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp('base') / 'base.pth'
    torch.save({'params': build_network(dict(BASE)).state_dict()}, base)
    text = TINY_OPTIONS.format(root=pairs, suffix='', backend='disk')
    text = text.replace('pretrain_network_g: ~', f'pretrain_network_g: {base}')
    text = re.sub(r'network_g:\n(  .*\n)+', NETWORK, text)
    file = tmp_path / 'tiny.yml'
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    return file


def allocate(*arguments):
    return main(['allocate', '-opt', 'tiny.yml', *map(str, arguments)])


def parameters_of(ranks):
    network = build_network(dict(BASE))
    pattern = {re.escape(name): rank for name, rank in ranks.items()}
    add_lora(network, LoRAConfig([re.escape(name) for name in ranks], rank_pattern=pattern))
    return sum(value.numel() for name, value in network.named_parameters() if name.endswith(('lora_A', 'lora_B')))


@pytest.mark.slow
def test_the_new_file_has_ranks_within_the_budget_and_trains(options, capsys, tmp_path):
    base = sum(value.numel() for value in build_network(dict(BASE)).parameters())
    assert allocate('--budget', '12%', '-o', 'new.yml', '--batches', 3, '--max-rank', 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['new.yml', 'tiny.yml']  # and nothing else
    before, after = load_options(options), load_options('new.yml')
    pattern = after['network_g']['lora'].pop('rank_pattern')
    assert after.pop('name') == 'tiny_allocated' and before.pop('name') == 'tiny'
    assert after == before
    ranks = {name.replace('\\', ''): rank for name, rank in pattern.items()}
    assert list(ranks) == TARGETS
    assert all(0 <= rank <= 3 for rank in ranks.values()) and len(set(ranks.values())) > 1
    used = parameters_of(ranks)
    assert used <= 0.12 * base
    for name in set(TARGETS) - {'conv_last'}:  # at rank 3 conv_last would be larger than the layer
        assert ranks[name] == 3 or parameters_of({**ranks, name: ranks[name] + 1}) > 0.12 * base
    printed = capsys.readouterr().out
    assert f'{used:,} ({used / base:.1%} of {base:,})' in printed
    for name, rank in ranks.items():
        assert re.search(rf'^{re.escape(name)} +(conv|upsampler) +{rank}( +#+)?$', printed, re.MULTILINE)

    assert check_options(load_options('new.yml'), is_train=True) == []
    done = run_python(
        '-m', 'lora_sr.train', '-opt', 'new.yml', '--force_yml', 'train:total_iter=2', 'val=~', cwd=tmp_path
    )
    assert 'iter:       2' in done.stderr
    state = read_checkpoint(tmp_path / 'experiments/tiny_allocated/models/net_g_latest.pth')['params']
    trained = {name: state.get(f'{name}.lora_A') for name in ranks}
    assert {name: 0 if value is None else len(value) // 3 for name, value in trained.items()} == ranks


def test_a_run_is_reproducible_and_leaves_the_log_to_others(options, capsys, monkeypatch):
    monkeypatch.setattr(basicsr_logger, 'initialized_logger', {})
    handlers = list(logging.getLogger('basicsr').handlers)
    assert allocate('--budget', '10%', '-o', 'a.yml', '--batches', 2) == 0
    assert basicsr_logger.initialized_logger == {} and logging.getLogger('basicsr').handlers == handlers
    assert capsys.readouterr().err == ''
    assert allocate('--budget', '10%', '-o', 'b.yml', '--batches', 2) == 0
    assert open('a.yml').read() == open('b.yml').read()


def test_how_a_step_runs_does_not_count(options):
    """Nothing steps: gradients are not scaled, and batches not parted."""
    assert allocate('--budget', '10%', '-o', 'a.yml', '--batches', 2) == 0
    text = options.read_text()
    options.write_text(text.replace('train:\n  optim', 'train:\n  amp: fp16\n  accumulate_iter: 2\n  optim'))
    assert allocate('--budget', '10%', '-o', 'b.yml', '--batches', 2) == 0
    ranks = [load_options(name)['network_g']['lora']['rank_pattern'] for name in ('a.yml', 'b.yml')]
    assert ranks[0] == ranks[1] and load_options('b.yml')['train']['amp'] == 'fp16'


def test_more_batches_than_an_epoch_has(options, monkeypatch):
    taken = []

    def spy(model, layers, batches):
        batches = list(batches)
        taken.extend(batch['lq_path'] for batch in batches)
        return measure_gradients(model, layers, iter(batches))

    monkeypatch.setattr('lora_sr.basicsr.rank_allocation.measure_gradients', spy)
    options.write_text(options.read_text().replace('dataset_enlarge_ratio: 10', 'dataset_enlarge_ratio: 2'))
    assert allocate('--budget', '10%', '-o', 'a.yml', '--batches', 11) == 0  # an epoch has 8
    assert len(taken) == 11 and taken[:3] != taken[8:]


def test_ranks_of_an_earlier_allocation_are_replaced(options):
    assert allocate('--budget', '12%', '-o', 'first.yml', '--batches', 2) == 0
    first = load_options('first.yml')['network_g']['lora']['rank_pattern']
    assert 0 in first.values()
    assert main(['allocate', '-opt', 'first.yml', '--budget', '40%', '-o', 'second.yml', '--batches', '2']) == 0
    second = load_options('second.yml')['network_g']['lora']['rank_pattern']
    assert list(second) == list(first)  # layers left out before are targets still
    assert all(second[name] >= rank for name, rank in first.items()) and second != first


def run_options(options, **changes):
    """The options as BasicSR hands them to a model."""
    opt = load_options(options)
    opt.update(is_train=True, dist=False, rank=0, world_size=1, **changes)
    opt['path'].update(models='', training_states='')
    for dataset in opt['datasets'].values():
        dataset.update(scale=2, phase='train')
    return opt


def some_batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            'lq': torch.rand(2, 3, 8, 8, generator=generator),
            'gt': torch.rand(2, 3, 16, 16, generator=generator),
            'lq_path': [],
        }
        for _ in range(count)
    ]


def plain_copy(network):
    plain = build_network(dict(BASE))
    plain.load_state_dict({key: value for key, value in network.state_dict().items() if 'lora_' not in key})
    return plain.double()


def targets(network):
    return {name: network.get_submodule(name) for name in TARGETS}


@pytest.mark.parametrize('rank_pattern', [{}, {'body.*': 0}], ids=['all adapted', 'some left out'])
def test_gradients_are_those_of_plain_autograd(options, rank_pattern):
    opt = run_options(options)
    opt['network_g']['lora']['rank_pattern'] = rank_pattern
    model = build_model(opt)
    before = copy.deepcopy(model.net_g.state_dict())
    batches = some_batches()
    gradients = measure_gradients(model, targets(model.net_g), iter(batches))
    for key, value in model.net_g.state_dict().items():
        assert torch.equal(value, before[key]), key  # nothing has moved

    plain = plain_copy(model.net_g)
    loss = sum(F.l1_loss(plain(batch['lq'].double()), batch['gt'].double()) for batch in batches) / len(batches)
    loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), plain.get_parameter(f'{name}.weight').grad, rtol=1e-4, atol=1e-8)
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0


def test_gradients_of_a_gan_model_are_the_generators(options):
    opt = run_options(options, model_type='SRGANModel', network_d={'type': 'UNetDiscriminatorSN', 'num_in_ch': 3})
    opt['network_d']['num_feat'] = 4
    opt['train'].update(net_d_iters=2, net_d_init_iters=3, optim_d={'type': 'Adam', 'lr': 1e-3})
    opt['train'].update(gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.5})
    model = build_model(opt)
    discriminator = copy.deepcopy(model.net_d)  # its forward moves the vectors of its spectral norm
    before = copy.deepcopy(model.net_d.state_dict())
    (batch,) = some_batches(1)
    gradients = measure_gradients(model, targets(model.net_g), iter([batch]))
    assert all(torch.equal(value, before[key]) for key, value in model.net_d.state_dict().items() if 'orig' in key)

    plain = plain_copy(model.net_g).float()
    output = plain(batch['lq'])
    judged = discriminator(output)
    adversarial = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
    (F.l1_loss(output, batch['gt']) + 0.5 * adversarial).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain.get_parameter(f'{name}.weight').grad, rtol=1e-3, atol=1e-6)


def test_base_weights_are_found_beside_updates():
    network = build_network(dict(BASE))
    weight = network.conv_hr.weight
    add_lora(network, LoRAConfig(['conv_hr']))
    torch.nn.init.ones_(network.conv_hr.lora_B)
    assert base_weight(network.conv_hr) is weight and base_weight(network.conv_last) is network.conv_last.weight


FLOW = 'network_g: {type: AdaptSR, base: {type: SRVGGNetCompact}, lora: {groups: [all], rank: 4}}  # one line\n'
TEXTS = {
    'block': f'name: run  # its name\n{NETWORK}\npath: {{}}\n',
    'last': f'# head\nname: run\n\n{NETWORK}'.rstrip(),
    'flow lora': 'network_g:\n  type: AdaptSR\n  lora: {groups: [all], rank: 4}  # ranks\n  base: {}\nname: "run"\n',
    'flow': f"name: 'run'\n{FLOW}path: ~  # end\n",
    'flow on lines': 'name: run\nnetwork_g:\n  lora: {\n    rank: 4,  # r\n    groups: [all],\n  }  # lora\n',
    'pattern block': f'name: run\n{NETWORK}    rank_pattern:\n      a: 3\n      b: 0\n    # of alpha\n    norm: a',
    'pattern flow': f'name: run\n{NETWORK}    rank_pattern: {{b: 1}}  # few\n\n# the end\n',
    'pattern in flow': FLOW.replace('rank: 4', 'rank_pattern: {a: 1}, rank: 4  ') + 'name: run\n',
    'empty pattern': f'name: run\n{NETWORK}    rank_pattern:  # none yet\n    groups_: x\n',
    'JSON': '{"name": "run", "network_g": {"lora": {"rank": 4}}}',
    'list at the end': 'name: run\nnetwork_g:\n  lora:\n    rank: 4\n    groups:\n    - conv\n    # - mlp\n  a: b',
}


@pytest.mark.parametrize('name', TEXTS)
def test_ranks_are_put_into_the_text(tmp_path, name):
    text = TEXTS[name]
    (tmp_path / 'old.yml').write_text(text)
    pattern = {r'body\.0\.conv1': 3, 'conv_last': 0}
    write_ranks(tmp_path / 'old.yml', pattern, 'by budget', tmp_path / 'new.yml')
    old, new = (load_options(tmp_path / f'{file}.yml') for file in ('old', 'new'))
    assert new['network_g']['lora'].pop('rank_pattern') == pattern
    old['network_g']['lora'].pop('rank_pattern', None)
    assert new.pop('name') == old.pop('name') + '_allocated' and new == old
    written = (tmp_path / 'new.yml').read_text()
    assert re.findall('# .*', text) == [comment for comment in re.findall('# .*', written) if comment != '# by budget']
    # Every line of the old file is there but those that had to change.
    lost = [line[2:] for line in difflib.ndiff(text.splitlines(), written.splitlines()) if line.startswith('- ')]
    assert all(re.search('name:|rank|lora: {|a: 3|b: 0|groups: \\[all\\],$|"', line) for line in lost), lost


@pytest.mark.parametrize(
    'text',
    [
        'base: &lora {rank: 4}\nname: run\nnetwork_g: {lora: *lora, other: *lora}\n',
        'name: run\ncommon: &common\n  lora: {rank: 4}\nnetwork_g:\n  <<: *common\n',
    ],
)
def test_what_cannot_be_changed_in_place_is_refused(tmp_path, text):
    (tmp_path / 'old.yml').write_text(text)
    with pytest.raises(InputError, match='without anchors'):
        write_ranks(tmp_path / 'old.yml', {'a': 1}, '', tmp_path / 'new.yml')


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['--budget', '0'], 'The budget is 0: it must be a share such as 5%'),
        (['--budget=-3%'], 'The budget is -3%'),
        (['--budget', '101%'], 'above 0 and at most the'),
        (['--budget', 'nan'], 'The budget is nan'),
        (['--budget', 'five'], 'The budget is five'),
        (['--budget', '17'], 'The budget is 17 parameters: rank 1 in a single layer takes at least'),
        (['--budget', '5%', '--batches', '0'], 'The number of batches is 0'),
        (['--budget', '5%', '--max-rank', '0'], 'The largest rank is 0'),
        (['--budget', '5%', '--chart', 'no/chart.png'], 'The folder no of the output does not exist'),
        (['--budget', '5%', '--batches', '1', '--chart', 'chart.xyz'], 'chart.xyz must end in .png or .svg or .pdf'),
        (['--budget', '5%', '--chart', 'tiny.yml'], 'The output tiny.yml must end in .png'),
    ],
)
def test_wrong_arguments(options, capsys, arguments, sentence):
    assert allocate(*arguments, '-o', 'new.yml') == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert [path.name for path in options.parent.iterdir()] == ['tiny.yml']


def test_wrong_option_files(options, capsys):
    text = options.read_text()
    assert allocate('--budget', '5%', '-o', 'tiny.yml') == 2
    assert 'The output tiny.yml exists' in capsys.readouterr().err and options.read_text() == text
    options.write_text(text.replace('type: AdaptSR', 'type: SwinIR'))
    assert allocate('--budget', '5%', '-o', 'new.yml') == 2
    assert 'network_g of tiny.yml is SwinIR' in capsys.readouterr().err
    options.write_text(text.replace('gt_size: 16', 'gt_size: 15'))
    assert allocate('--budget', '5%', '-o', 'new.yml') == 2
    assert 'gt_size is 15' in capsys.readouterr().err


def test_options_that_the_ranks_do_not_leave_valid(options, capsys):
    text = options.read_text()
    options.write_text(text.replace('    alpha: 2\n', '    alpha_pattern: {body.0.conv1: 4, body.1.conv1: 4}\n'))
    assert allocate('--budget', '150', '-o', 'new.yml', '--batches', 1) == 2  # enough for one layer
    error = capsys.readouterr().err
    assert 'alpha_pattern "body' in error and len(error.splitlines()) == 1
    assert [path.name for path in options.parent.iterdir()] == ['tiny.yml']


def test_overwriting_when_asked(options):
    (options.parent / 'new.yml').write_text('mine')
    (options.parent / 'chart.png').write_text('mine')
    arguments = ['--budget', '12%', '-o', 'new.yml', '--batches', 1, '--chart', 'chart.png']
    assert allocate(*arguments) == 2
    assert (options.parent / 'new.yml').read_text() == 'mine'
    assert allocate(*arguments, '--overwrite') == 0
    assert load_options('new.yml')['name'] == 'tiny_allocated'
    assert (options.parent / 'chart.png').read_bytes().startswith(b'\x89PNG')


def test_the_chart_shows_the_ranks_in_the_colors_of_the_groups():
    pytest.importorskip('matplotlib')
    network = build_network(dict(BASE))
    groups = layer_groups(network)
    ranks = {name: index % 4 for index, name in enumerate(groups)}
    allocation = Allocation(ranks, groups, 1000, 900, 10000)
    (axes,) = plot_ranks(allocation).axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in axes.patches}
    assert [bars[index].get_height() for index in range(len(ranks))] == list(ranks.values())
    colors = {}
    for index, group in enumerate(groups.values()):
        colors.setdefault(group, set()).add(bars[index].get_facecolor())
    assert all(len(of_group) == 1 for of_group in colors.values()) and colors['conv'] != colors['upsampler']
    longest = max(format_ranks(allocation).splitlines(), key=lambda line: line.count('#'))
    assert longest.count('#') == 40 and ' 3  #' in longest


def test_the_training_set_is_the_files_own(options, monkeypatch):
    built = []

    def spy(dataset_opt):
        built.append(dataset_opt['dataroot_gt'])
        return build_dataset(dataset_opt)

    monkeypatch.setattr('lora_sr.basicsr.built.build_dataset', spy)
    assert allocate('--budget', '10%', '-o', 'new.yml', '--batches', 1) == 0
    assert built == [load_options(options)['datasets']['train']['dataroot_gt']]
