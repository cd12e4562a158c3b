"""Validation in tiles and under `inference_mode`, against BasicSR's own `test` of whole images."""

import pytest
import torch
from basicsr.models import build_model
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
from tiny_run import model_options

from lora_sr.archs.span import SPAN
from lora_sr.basicsr import tested as module

NETWORKS = {
    'SRModel': {'type': 'MSRResNet', 'num_feat': 8, 'num_block': 2, 'upscale': 2},
    'SwinIRModel': {
        'type': 'SwinIR', 'upscale': 2, 'img_size': 16, 'window_size': 4, 'depths': [2], 'embed_dim': 12,
        'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
    },
    'SPAN': {'type': 'SPAN', 'feature_channels': 8, 'upscale': 2, 'deploy': True},
}  # fmt: skip


real_cut_axis = module.cut_axis


def make(tmp_path, name, is_train, ema_decay=0, model_type=None, **train):
    options = {**model_options(tmp_path), 'scale': 2}
    options['train'].update(ema_decay=ema_decay, **train)
    options['val']['tile'] = 4  # which is too small: it is enlarged
    model_type = model_type or (name if name in MODEL_REGISTRY else 'SRModel')
    options.update(model_type=model_type, network_g=dict(NETWORKS[name]))
    options['is_train'] = is_train
    torch.manual_seed(0)
    return build_model(options)


@pytest.mark.parametrize(
    ('name', 'is_train', 'ema_decay', 'train'),
    [
        ('SRModel', True, 0, {}),
        ('SRModel', True, 0.9, {}),
        ('SRModel', False, 0, {}),
        ('SwinIRModel', True, 0, {}),
        ('SwinIRModel', True, 0, {'amp': 'bf16', 'compile': {'backend': 'eager'}}),  # measured in float64 none the less
    ],
)
def test_tiles_give_what_the_whole_image_gives(tmp_path, monkeypatch, name, is_train, ema_decay, train):
    model = make(tmp_path, name, is_train, ema_decay, **train)
    model.feed_data({'lq': torch.rand(1, 3, 61, 78)})
    model.test()
    whole, calls = model.output, []
    monkeypatch.setattr(module, 'cut_axis', lambda *values: calls.append(values) or real_cut_axis(*values))
    with module.tested(model, 1):
        model.test()
    assert model.output.shape == whole.shape and model.lq.shape == (1, 3, 61, 78)
    assert (model.output - whole).abs().max() < 1 / 255 / 8
    ((_, side, overlap, multiple), _) = calls
    assert len(real_cut_axis(61, side, overlap, multiple)) > 1  # it has been cut
    assert 'test' not in vars(model)


def test_how_to_cut_is_measured_once_for_all_sets_of_a_validation(tmp_path, monkeypatch):
    model, measured = make(tmp_path, 'SRModel', True), []
    find_cut = module.find_cut
    monkeypatch.setattr(module, 'find_cut', lambda *values: measured.append(1) or find_cut(*values))
    for iteration in (1, 1, 2):
        with module.tested(model, iteration):
            for size in (20, 30):
                model.feed_data({'lq': torch.rand(1, 3, size, size)})
                model.test()
    assert len(measured) == 2


def is_inference(model):
    model.opt['val'].pop('tile')
    model.feed_data({'lq': torch.rand(1, 3, 8, 8)})
    with module.tested(model, 1):
        model.test()
    return model.output.is_inference()


@pytest.mark.parametrize('name', NETWORKS)
def test_a_model_trains_after_a_validation(tmp_path, name):
    """What is made under `inference_mode` cannot be trained on."""
    model = make(tmp_path, name, True)
    assert is_inference(model)
    model.feed_data({'lq': torch.rand(1, 3, 8, 8), 'gt': torch.rand(1, 3, 16, 16)})
    model.optimize_parameters(1)


class Remembering(SPAN):
    """Of somebody else: it keeps what it made of an image for the next one of its size."""

    def forward(self, x):
        if getattr(self, 'kept', None) is None:
            self.kept = torch.ones_like(x)
        return super().forward(x * self.kept)


def test_a_network_of_others_may_keep_something(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Remembering', Remembering)
    monkeypatch.setitem(NETWORKS, 'Remembering', {'type': 'Remembering', 'feature_channels': 8, 'upscale': 2})
    model = make(tmp_path, 'Remembering', True)
    assert not is_inference(model)
    model.feed_data({'lq': torch.rand(1, 3, 8, 8, requires_grad=True), 'gt': torch.rand(1, 3, 16, 16)})
    model.optimize_parameters(1)


class Tuning(SRModel):
    """Of somebody else: it adapts its network to each image that it tests."""

    def test(self):
        with torch.enable_grad():
            super_resolved = self.net_g(self.lq)
            (gradient,) = torch.autograd.grad(super_resolved.mean(), [self.net_g.conv_first.weight])
        self.output = super_resolved.detach() + gradient.mean()


def test_a_model_of_others_may_differentiate(tmp_path, monkeypatch):
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Tuning', Tuning)
    assert not is_inference(make(tmp_path, 'SRModel', True, model_type='Tuning'))


def test_the_stock_model_keeps_nothing_of_a_tile(tmp_path):
    """An error in a tile leaves the image as it was."""
    model = make(tmp_path, 'SRModel', False)
    image = torch.rand(1, 3, 40, 40)
    model.feed_data({'lq': image})
    test = model.test
    with module.tested(model, 1), pytest.raises(RuntimeError):
        model.net_g = torch.nn.Linear(1, 1)
        model.test()
    assert model.lq is image and model.test == test
