"""What a later BasicSR may have repaired itself is left alone, and so is what has been patched."""

import copy
import math
import os
import types
from collections import Counter

import pytest
import torch
import yaml
from basicsr.archs import (
    basicvsr_arch,
    dfdnet_arch,
    discriminator_arch,
    spynet_arch,
    tof_arch,
    vgg_arch,
)
from basicsr.data import paired_image_dataset, prefetch_dataloader
from basicsr.losses import basic_loss
from basicsr.models import base_model, realesrgan_model, realesrnet_model
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import DiffJPEG, dist_util, img_process_util, img_util, logger, misc, options
from basicsr.utils.file_client import LmdbBackend
from stock_basicsr import MODELS, stock

from lora_sr.basicsr import patches
from lora_sr.basicsr.metrics import lower_is_better
from lora_sr.images.decoding import decode


def test_apply_again_changes_nothing():
    def state():
        methods = [vars(BaseModel)[name] for name in ('get_optimizer', 'load_network', 'save_network')]
        return [*methods, BaseModel.model_to_device, LmdbBackend.__init__, options.parse_options, misc.check_resume,
                options.ordered_yaml, dist_util._init_dist_pytorch, dist_util._init_dist_slurm,
                BaseModel.model_ema, img_process_util.filter2D, basic_loss.PerceptualLoss.__init__,
                discriminator_arch.VGGStyleDiscriminator.forward,
                *(vars(getattr(module, name))['__init__'] for module, name in MODELS),
                *(vars(getattr(module, name))['_dequeue_and_enqueue'] for module, name in MODELS)]  # fmt: skip

    before = state()
    patches.apply()
    assert all(one is other for one, other in zip(before, state()))


class Good:
    """Functions of BasicSR without the defects, as far as the patches look at them."""

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        return getattr(torch.optim, optim_type)(params, lr, **kwargs)

    def load_network(self, net, load_path, strict=True, param_key='params'):
        net.load_state_dict(torch.load(load_path, weights_only=True)[param_key], strict=strict)

    def save_network(self, net, net_label, current_iter, param_key='params'):
        torch.save({param_key: net.state_dict()}, 'new')
        os.replace('new', net_label)

    def save_training_state(self, epoch, current_iter):
        torch.save({'epoch': epoch}, 'new')
        os.replace('new', f'{current_iter}.state')

    def model_to_device(self, net):
        return net.to(torch.cuda.current_device() if self.device.type == 'cuda' else 'cpu')

    def resume_training(self, resume_state):
        for optimizer, state in zip(self.optimizers, resume_state['optimizers']):
            if len(optimizer.param_groups[0]['betas']) == len(state['param_groups'][0]['betas']):
                optimizer.load_state_dict(state)

    def _print_different_keys_loading(self, crt_net, load_net, strict=True):
        pass

    def model_ema(self, decay=0.999):
        for own, average in zip(self.net_g.parameters(), self.net_g_ema.parameters()):
            average.data.mul_(decay if own.requires_grad else 1)

    def init_training_settings(self):
        self.net_g_ema = copy.deepcopy(self.net_g)
        self.setup_schedulers()

    def setup_optimizers(self):
        self.optimizers = [torch.optim.Adam(value for value in self.net_g.parameters() if value.requires_grad)]

    def degrade(self, opt):
        self.jpeger = DiffJPEG(differentiable=False).to(self.device)

    def _dequeue_and_enqueue(self):
        self.queue_lr = torch.zeros(1, device=self.device)

    def open_database(self, db_paths):
        self.db_paths = db_paths

    def perceptual_loss(self, layer_weights, criterion='l1'):
        self.criterion = {'l1': torch.nn.L1Loss, 'l2': torch.nn.MSELoss}[criterion]()

    def forward(self, x):
        return self.linear2(self.linear1(x.flatten(1)))

    def run(self):
        try:
            self.queue.put(next(self.generator))
        except BaseException as error:
            self.queue.put(error)

    def begin_later(self, loader):
        self.ori_loader = loader

    def _initialize_best_metric_results(self, dataset_name):
        better = 'lower' if lower_is_better(dataset_name) else 'higher'
        self.best_metric_results = {dataset_name: {'better': better}}

    def reduce_loss_dict(self, loss_dict):
        return {name: value.item() for name, value in loss_dict.items() if math.isfinite(value)}

    def init_wandb_logger(opt):
        return opt['logger']['wandb']['run_id']

    def message_logger(self, opt, start_iter=1, tb_logger=None):
        self.last = opt['train']['total_iter']

    @staticmethod
    def filter2D(img, kernel):
        return img.contiguous().view(1, -1) * kernel

    @staticmethod
    def _init_dist_pytorch(backend, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['RANK']) % torch.cuda.device_count())

    def several_roots(self, opt):
        self.roots = opt['dataroot_gt'] if isinstance(opt['dataroot_gt'], list) else [opt['dataroot_gt']]

    @staticmethod
    def imfrombytes(content, flag='color', float32=False):
        return decode(content)

    @staticmethod
    def check_resume(opt, resume_iter):
        opt['path']['pretrain_network_g'] = f'net_g_{resume_iter}.pth'

    @staticmethod
    def ordered_yaml():
        return yaml.SafeLoader, yaml.SafeDumper

    def load_part(self, load_path):
        self.load_state_dict(torch.load(load_path, weights_only=True))


NET, GAN = realesrnet_model.RealESRNetModel, realesrgan_model.RealESRGANModel
LEFT_ALONE = [
    (patches.optimizers.patch_get_optimizer, [(BaseModel, 'get_optimizer')]),
    (patches.checkpoints.patch_load_network, [(BaseModel, 'load_network')]),
    (
        patches.checkpoints.patch_weights_of_parts,
        [
            (spynet_arch.SpyNet, '__init__', 'load_part'),
            (tof_arch.SPyNetTOF, '__init__', 'load_part'),
            (basicvsr_arch.EDVRFeatureExtractor, '__init__', 'load_part'),
            (dfdnet_arch.DFDNet, '__init__', 'load_part'),
            (vgg_arch.VGGFeatureExtractor, '__init__', 'load_part'),
        ],
    ),
    (patches.checkpoints.patch_saving, [(BaseModel, 'save_network'), (BaseModel, 'save_training_state')]),
    (patches.checkpoints.patch_frozen_warnings, [(SRModel, 'setup_optimizers')]),
    (patches.checkpoints.patch_missing_lora_warnings, [(BaseModel, '_print_different_keys_loading')]),
    (patches.distributed.patch_model_to_device, [(BaseModel, 'model_to_device')]),
    (
        patches.distributed.patch_distributed_start,
        [(dist_util, '_init_dist_pytorch'), (dist_util, '_init_dist_slurm', '_init_dist_pytorch')],
    ),
    (patches.resume.patch_resume_training, [(BaseModel, 'resume_training')]),
    (patches.resume.patch_check_resume, [(misc, 'check_resume')]),
    (patches.average.patch_average_of_frozen, [(BaseModel, 'model_ema')]),
    (
        patches.degradations.patch_degradation_device,
        [
            (NET, '__init__', 'degrade'),
            (GAN, '__init__', 'degrade'),
            (NET, '_dequeue_and_enqueue'),
            (GAN, '_dequeue_and_enqueue'),
        ],
    ),
    (
        patches.degradations.patch_views,
        [(img_process_util, 'filter2D'), (discriminator_arch.VGGStyleDiscriminator, 'forward')],
    ),
    (patches.lmdb.patch_lmdb_backend, [(LmdbBackend, '__init__', 'open_database')]),
    (patches.prefetch.patch_prefetch_thread, [(prefetch_dataloader.PrefetchGenerator, 'run')]),
    (
        patches.prefetch.patch_prefetchers,
        [
            (prefetch_dataloader.CPUPrefetcher, '__init__', 'begin_later'),
            (prefetch_dataloader.CUDAPrefetcher, '__init__', 'begin_later'),
        ],
    ),
    (patches.images.patch_imfrombytes, [(img_util, 'imfrombytes')]),
    (
        patches.roots.patch_paired_image_dataset,
        [(paired_image_dataset.PairedImageDataset, '__init__', 'several_roots')],
    ),
    (patches.validation.patch_best_metrics, [(BaseModel, '_initialize_best_metric_results')]),
    (patches.divergence.patch_reduce_loss_dict, [(BaseModel, 'reduce_loss_dict')]),
    (patches.messages.patch_message_logger, [(logger.MessageLogger, '__init__', 'message_logger')]),
    (patches.messages.patch_init_wandb_logger, [(logger, 'init_wandb_logger')]),
    (patches.losses.patch_perceptual_criterion, [(basic_loss.PerceptualLoss, '__init__', 'perceptual_loss')]),
    (patches.options.patch_ordered_yaml, [(options, 'ordered_yaml')]),
]


@pytest.mark.parametrize(('apply', 'places'), LEFT_ALONE, ids=lambda value: getattr(value, '__name__', ''))
def test_what_is_not_defective_is_left_alone(apply, places, monkeypatch):
    for owner, name, *other in places:
        monkeypatch.setattr(owner, name, getattr(Good, other[0] if other else name))
    apply()
    for owner, name, *other in places:
        assert vars(owner)[name] is getattr(Good, other[0] if other else name)


def test_an_average_that_is_copied_is_left_alone(monkeypatch):
    scheduled = vars(stock(base_model, 'BaseModel'))['setup_schedulers']
    monkeypatch.setattr(BaseModel, 'setup_schedulers', scheduled)
    monkeypatch.setattr(SRModel, 'init_training_settings', Good.init_training_settings)
    patches.average.patch_average()
    assert BaseModel.setup_schedulers is scheduled


def test_types_that_are_allowed_are_left_alone(monkeypatch):
    allowed = []
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: Counter())
    monkeypatch.setattr(torch.serialization, 'add_safe_globals', allowed.extend, raising=False)
    patches.resume.patch_training_state_types()
    assert not allowed


def test_every_patch_has_such_a_test():
    rooms = [getattr(patches, name) for name in vars(patches)]
    rooms = [room for room in rooms if isinstance(room, types.ModuleType)]
    found = {value for room in rooms for name, value in vars(room).items() if name.startswith('patch_')}
    elsewhere = {
        patches.average.patch_average,
        patches.resume.patch_training_state_types,
        patches.resume.patch_load_resume_state,  # test_load_resume_state_of_a_script_is_replaced
        patches.feeding.patch_cuda_prefetcher,  # it needs CUDA, see tests/gpu
        patches.feeding.patch_feed_data,  # no BasicSR knows images of whole numbers, see test_raw_datasets.py
        patches.feeding.patch_realesrgan_dataset,  # nor raw databases
        patches.lmdb.patch_reading_of_databases,  # no BasicSR looks at the file while it reads
        patches.samples.patch_build_dataloader,  # no BasicSR seeds samples, see tests/basicsr/test_samples.py
        patches.samples.patch_create_train_val_dataloader,
        patches.samples.patch_update_learning_rate,
        patches.validation.patch_validation,  # its end, in train_pipeline, cannot be told from here
        patches.options.patch_parse_options,  # no BasicSR checks options as it does
        patches.checkpoints.patch_build_model,  # no defect, but the end of what patch_parse_options begins
        patches.options.patch_copy_opt_file,  # BasicSR's has no other form, see tests/checkpoints/test_origin.py
        patches.options.patch_network_options,  # sections without a base, in tests/basicsr/test_adaptsr_runs.py
    }
    assert {apply for apply, _ in LEFT_ALONE} | elsewhere == found
