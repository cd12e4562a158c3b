"""Options to spoil: of a tiny run, of a distillation, on data of their own, with a model of somebody else's."""

import pytest
import torch
import yaml
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY
from tiny_run import TINY_OPTIONS, write_pairs

from lora_sr.option_file import OptionLoader, load_options

DISTILLATION = """\
network_t: {{type: SPAN, feature_channels: 8, upscale: 2}}
network_g: {{type: SPAN, feature_channels: 4, upscale: 2}}
path: {{pretrain_network_t: {teacher}, param_key_t: params}}
train:
  optim_g: {{type: Adam, lr: 1e-3}}
  scheduler: {{type: MultiStepLR, milestones: [3]}}
  total_iter: 6
  pixel_opt: {{type: L1Loss}}
  distill_pixel_opt: {{type: L1Loss}}
  affinity_opt: {{type: SpatialAffinityLoss, loss_weight: 1.0, layers: [block_1, block_2]}}
"""


@pytest.fixture
def options(tiny_options):
    return load_options(tiny_options)


@pytest.fixture
def distillation(options, tmp_path):
    from lora_sr.archs.span import SPAN

    torch.save({'params': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'teacher.pth')
    options.update(yaml.load(DISTILLATION.format(teacher=tmp_path / 'teacher.pth'), Loader=OptionLoader))
    options['model_type'] = 'DistillationModel'
    return options


@pytest.fixture
def others(monkeypatch):
    """A model, a dataset and a loss of somebody else's."""
    from basicsr.data.paired_image_dataset import PairedImageDataset
    from basicsr.models.sr_model import SRModel

    class MyModel(SRModel):
        pass

    class MyDataset(PairedImageDataset):
        pass

    for registry, entry in ((MODEL_REGISTRY, MyModel), (DATASET_REGISTRY, MyDataset)):
        monkeypatch.setitem(registry._obj_map, entry.__name__, entry)


# --- data ---


@pytest.fixture
def data(tmp_path):
    """Pairs of one's own to damage, and options for them, as databases."""
    write_pairs(tmp_path / 'data')

    def options(suffix):
        (tmp_path / 'data.yml').write_text(
            TINY_OPTIONS.format(root=tmp_path / 'data', suffix=suffix, backend='lmdb' if suffix else 'disk')
        )
        opt = load_options(tmp_path / 'data.yml')
        del opt['datasets']['val']
        return opt

    return tmp_path / 'data', options
