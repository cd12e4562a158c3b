"""SPAN and DSCLoRA: against the authors' outputs and weights."""

import copy
import json

import numpy as np
import pytest
import torch

from lora_sr import load_network
from lora_sr.adapters import LoRAConfig, add_lora, count_parameters, lora_layers, merge_lora
from lora_sr.archs import NetworkInfo, fold, is_training_form
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import Checkpoint
from lora_sr.checkpoints.content import load_weights
from lora_sr.errors import InputError

OFFICIAL = ['weights/SPAN/spantiny_ch26_x4.pth', 'weights/SPAN/span_ch28_x4.pth', 'weights/DSCLoRA/DSCF_ch26_x4.pth']


def golden(shared, checkpoint):
    name = checkpoint.rsplit('/', 1)[1].replace('.pth', '.npz')
    return {key: torch.from_numpy(value) for key, value in np.load(shared / f'golden/networks/{name}').items()}


def random_adapted(upscale, rank, channels=10):
    torch.manual_seed(rank)
    network = DSCLoRA(feature_channels=channels, upscale=upscale, rank=rank, alpha=2 * rank).eval()
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B.normal_(std=0.02)
    return network


@torch.no_grad()
@pytest.mark.parametrize('checkpoint', OFFICIAL)
def test_official_weights_give_the_authors_output(shared, checkpoint):
    network, truth = load_network(shared / checkpoint), golden(shared, checkpoint)
    assert type(network) is SPAN and not is_training_form(network)
    assert (network(truth['lr']) - truth['sr']).abs().max() <= 1e-4


@torch.no_grad()
def test_training_form_gives_the_authors_output_unfolded_and_folded(shared):
    path = shared / 'golden/networks/span_trainform_ch16_x2.pth'
    network, truth = load_network(path), golden(shared, 'networks/span_trainform_ch16_x2.pth')
    assert is_training_form(network)
    assert (network(truth['lr']) - truth['sr_train']).abs().max() <= 1e-4
    assert (fold(network)(truth['lr']) - truth['sr_eval']).abs().max() <= 1e-4
    assert not is_training_form(network)


def test_parameter_counts_are_the_published_ones(shared):
    reference = json.loads((shared / 'reference.json').read_text())
    published = reference['measured_with_official_code']
    for name in ('spantiny_ch26_x4', 'span_ch28_x4', 'DSCF_ch26_x4'):
        network = load_network(shared / published[name]['weights'])
        assert count_parameters(network).total == published[name]['params']
    adapted = reference['derived']['ConvLoRA parameter counts']
    trainable = count_parameters(DSCLoRA(feature_channels=26, upscale=4, rank=8)).trainable
    assert trainable == adapted['SPAN ch26 x4, rank 8 on those 20 convolutions']


def test_lora_sits_where_the_official_entry_differs_from_its_start(shared):
    start = Checkpoint.read(shared / 'weights/SPAN/spantiny_ch26_x4.pth').state
    entry = Checkpoint.read(shared / 'weights/DSCLoRA/DSCF_ch26_x4.pth').state
    # Rounding (the entry was saved from another program) stays below 3e-5, training moved weights by 7e-4 and more.
    changed = {key.rpartition('.')[0] for key in start if (start[key] - entry[key]).abs().max() > 1e-4}
    assert {name for name, _ in lora_layers(DSCLoRA(feature_channels=26))} == changed


@torch.no_grad()
def test_folding_is_exact_in_float64():
    torch.manual_seed(0)
    network = SPAN(feature_channels=6, upscale=3).double()
    x = torch.rand(2, 3, 7, 9, dtype=torch.float64)
    expected = network(x)
    torch.testing.assert_close(fold(network)(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_either_form_loads_strictly_where_it_can():
    torch.manual_seed(0)
    training, deploy, adapted = (
        SPAN(feature_channels=6),
        SPAN(feature_channels=6, deploy=True),
        DSCLoRA(feature_channels=6),
    )
    x = torch.rand(1, 3, 8, 8)
    for network in (deploy, adapted, SPAN(feature_channels=6)):
        network.load_state_dict(training.state_dict())
        torch.testing.assert_close(network(x), training(x), rtol=1e-4, atol=1e-5)
    adapted.load_state_dict(deploy.state_dict())
    with pytest.raises(RuntimeError, match='cannot be unfolded'):
        training.load_state_dict(deploy.state_dict())


@torch.no_grad()
def test_stale_eval_conv_of_a_training_checkpoint_is_ignored():
    network = SPAN(feature_channels=6)
    state = network.state_dict()
    stale = {**state, 'conv_1.eval_conv.weight': torch.randn(6, 3, 3, 3), 'conv_1.eval_conv.bias': torch.randn(6)}
    deploy = SPAN(feature_channels=6, deploy=True)
    deploy.load_state_dict(stale)
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(deploy(x), network(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('upscale', [2, 3, 4])
@pytest.mark.parametrize('rank', [1, 2, 4, 8, 16])
def test_merged_equals_adapted(upscale, rank):
    network = random_adapted(upscale, rank)
    base = SPAN(feature_channels=10, upscale=upscale, deploy=True)
    base.load_state_dict(merge_lora(copy.deepcopy(network)).state_dict())
    x = torch.rand(2, 3, 11, 13)
    assert (base(x) - network(x)).abs().max() <= 1e-5
    assert base(x).shape == (2, 3, 11 * upscale, 13 * upscale)


@torch.no_grad()
@pytest.mark.parametrize(
    'wrap',
    [
        lambda s: s,
        lambda s: {'params': s},
        lambda s: {'params_ema': s, 'params': {}},
        lambda s: {'params': {f'module.{k}': v for k, v in s.items()}},
    ],
)
def test_adapted_checkpoint_loads_alone_with_its_ranks_and_alphas(tmp_path, wrap):
    network = DSCLoRA(
        feature_channels=10,
        upscale=3,
        rank=4,
        alpha=6,
        rank_pattern={r'upsampler\.0': 2},
        alpha_pattern={r'conv_2\..*': 3},
    )
    for _, layer in lora_layers(network):
        layer.lora_B.normal_(std=0.02)
    torch.save(wrap(network.state_dict()), tmp_path / 'net.pth')
    loaded = load_network(tmp_path / 'net.pth')
    x = torch.rand(1, 3, 9, 9)
    assert type(loaded) is DSCLoRA and torch.equal(loaded(x), network(x))


@torch.no_grad()
def test_adapted_checkpoint_of_other_layers_loads_alone(tmp_path):
    network = add_lora(SPAN(feature_channels=6), LoRAConfig(['conv_cat', r'block_2\.c1_r\.conv\.1'], rank=2, alpha=4))
    for _, layer in lora_layers(network):
        layer.lora_B.normal_(std=0.02)
    torch.save(network.state_dict(), tmp_path / 'net.pth')
    loaded = load_network(tmp_path / 'net.pth')
    x = torch.rand(1, 3, 9, 9)
    assert is_training_form(loaded) and torch.equal(loaded.eval()(x), network.eval()(x))
    with pytest.raises(InputError, match='merge the LoRA before folding'):
        fold(loaded)
    # Nor may the update get lost when the branches are folded on loading.
    with pytest.raises(RuntimeError, match='block_2.c1_r.conv .* carry LoRA, which has to be merged before'):
        SPAN(feature_channels=6, deploy=True).load_state_dict(network.state_dict())


def test_incomplete_branches_are_told_and_not_folded():
    state = SPAN(feature_channels=6).state_dict()
    del state['block_3.c1_r.conv.1.bias']
    with pytest.raises(RuntimeError, match='Missing key.*block_3.c1_r.eval_conv'):
        SPAN(feature_channels=6, deploy=True).load_state_dict(state)


def test_checkpoints_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match='absent.pth cannot be read'):
        load_network(tmp_path / 'absent.pth')
    (tmp_path / 'broken.pth').write_bytes(b'not a checkpoint')
    with pytest.raises(InputError, match='broken.pth is damaged'):
        load_network(tmp_path / 'broken.pth')
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(InputError, match='belongs to no network known here'):
        load_network(tmp_path / 'other.pth')
    state = SPAN(feature_channels=6).state_dict()
    torch.save({'params': state}, tmp_path / 'net.pth')
    with pytest.raises(InputError, match='has no "params_ema"'):
        load_network(tmp_path / 'net.pth', 'params_ema')
    del state['block_3.c1_r.sk.weight']
    torch.save(state, tmp_path / 'half.pth')
    with pytest.raises(InputError, match='does not fit SPAN'):
        load_network(tmp_path / 'half.pth')
    torch.save(
        {k: v for k, v in random_adapted(2, 2).state_dict().items() if 'lora_alpha' not in k}, tmp_path / 'noalpha.pth'
    )
    with pytest.raises(InputError, match='carries LoRA but lacks lora_alpha'):
        load_network(tmp_path / 'noalpha.pth')


def test_misfit_does_not_speak_of_lora_tensors_that_may_be_missing():
    state = SPAN(feature_channels=8, deploy=True).state_dict()
    with pytest.raises(InputError) as error:
        load_weights(DSCLoRA(feature_channels=6), state, 'net.pth')
    assert 'has shape (8, 3, 3, 3) instead of (6, 3, 3, 3)' in str(error.value) and 'lora' not in str(error.value)


def test_incomplete_layer_is_named(tmp_path):
    state = random_adapted(2, 2).state_dict()
    del state['conv_2.eval_conv.weight']
    torch.save(state, tmp_path / 'net.pth')
    with pytest.raises(InputError, match='"conv_2.eval_conv" carries LoRA but lacks weight'):
        load_network(tmp_path / 'net.pth')


@torch.no_grad()
@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('num_in_ch, num_out_ch', [(3, 3), (1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize('upscale', [1, 2, 3, 4])
def test_spandrel_gives_the_same(tmp_path, norm, num_in_ch, num_out_ch, upscale):
    """Files as neosr and traiNNer-redux write them, and what spandrel makes of them."""
    spandrel = pytest.importorskip('spandrel.architectures.SPAN', reason='spandrel is the reference')
    torch.manual_seed(0)
    theirs = spandrel.SPAN(
        num_in_ch=num_in_ch, num_out_ch=num_out_ch, feature_channels=8, upscale=upscale, norm=norm
    ).eval()
    if num_in_ch == 1:  # it subtracts three means of one channel, and fails
        theirs.mean = torch.zeros(1, 1, 1, 1)
    if norm:  # images of a range of 1, as of a trained network
        theirs.upsampler[0].weight /= 255
    image = torch.rand(2, num_in_ch, 17, 23)
    expected = theirs(image)
    torch.save({'params_ema': theirs.state_dict()}, tmp_path / 'net.pth')
    network = load_network(tmp_path / 'net.pth')
    assert type(network) is SPAN and is_training_form(network) and network.norm == norm
    assert network.declared_info() == NetworkInfo(num_in_ch, num_out_ch, upscale)
    assert (network(image) - expected).abs().max() <= 1e-5

    torch.save(fold(network).state_dict(), tmp_path / 'deploy.pth')
    deployed = load_network(tmp_path / 'deploy.pth')
    assert not is_training_form(deployed) and (deployed(image) - expected).abs().max() <= 1e-5

    adapted = DSCLoRA(num_in_ch, num_out_ch, 8, upscale, rank=2, norm=norm)
    adapted.load_state_dict(theirs.state_dict())
    torch.save(adapted.state_dict(), tmp_path / 'adapted.pth')
    loaded = load_network(tmp_path / 'adapted.pth')
    assert type(loaded) is DSCLoRA and (loaded(image) - expected).abs().max() <= 1e-5
    deployed.load_state_dict(merge_lora(loaded).state_dict())


def test_normalization_is_not_taken_from_another_file():
    with_norm, without = SPAN(feature_channels=6), SPAN(feature_channels=6, norm=False)
    with pytest.raises(InputError, match=r'not known to it \(no_norm\)'):
        load_weights(with_norm, without.state_dict(), 'net.pth')
    with pytest.raises(InputError, match='no_norm'):
        load_weights(without, with_norm.state_dict(), 'net.pth')


@pytest.mark.parametrize(
    'change, message',
    [
        ({'conv_1.sk.weight': torch.zeros(6, 4, 1, 1)}, '"num_in_ch" of SPAN must be 3 .RGB. or 1 .gray., got 4'),
        ({'conv_1.sk.weight': torch.zeros(6)}, 'are those of no SPAN'),
        ({'upsampler.0.weight': torch.zeros(0, 6, 3, 3)}, '"upscale" of SPAN is 0'),
        ({'upsampler.0.weight': torch.zeros(2, 6, 3, 3)}, '"upscale" of SPAN is 0'),
        ({'upsampler.0.weight': torch.zeros(5, 6, 3, 3)}, r'has shape \(5, 6, 3, 3\) instead of \(3, 6, 3, 3\)'),
        ({'upsampler.0.weight': torch.zeros(())}, 'are those of no SPAN'),
        ({'no_norm': torch.zeros(5)}, r'no_norm has shape \(5,\) instead of \(1,\)'),
    ],
)
def test_shapes_of_no_span(tmp_path, change, message):
    torch.save({**SPAN(feature_channels=6).state_dict(), **change}, tmp_path / 'net.pth')
    with pytest.raises(InputError, match=message):
        load_network(tmp_path / 'net.pth')


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'num_in_ch': 4}, '"num_in_ch" of SPAN must be 3 .RGB. or 1 .gray., got 4'),
        ({'num_out_ch': 2}, '"num_out_ch" of SPAN must be 3 .RGB. or 1 .gray., got 2'),
        ({'upscale': 0}, '"upscale" of SPAN is 0'),
        ({'feature_channels': 2.5}, '"feature_channels" of SPAN is 2.5'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        SPAN(**arguments)
