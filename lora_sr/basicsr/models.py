"""Training of a student network under a teacher."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

from lora_sr.archs import fold
from lora_sr.archs.layout import lay_out
from lora_sr.basicsr import signals
from lora_sr.basicsr.options.distillation import DATA_PARALLEL_REFUSED, affinity_layers, find_modules, option_faults
from lora_sr.basicsr.options.schema import TEACHER
from lora_sr.basicsr.precompute import place_of, precompute, teacher_key
from lora_sr.basicsr.records import record
from lora_sr.basicsr.samples import stream_of
from lora_sr.basicsr.step.settings import memory_format
from lora_sr.checkpoints.content import load_weights, read_checkpoint
from lora_sr.errors import InputError


class FeatureTap:
    """Keeps the outputs of some modules of a network from its latest forward pass.

    Of a module that returns several tensors, the first is kept. An in-place operation that follows a module (such as
    an in-place ReLU) changes what is kept: the feature is then the one after it.

    Args:
        modules: The modules to listen to.
    """

    def __init__(self, modules: list[nn.Module]):
        self._outputs: list[Tensor | None] = [None] * len(modules)
        for index, module in enumerate(modules):
            module.register_forward_hook(partial(self._keep, index))

    def _keep(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        self._outputs[index] = output[0] if isinstance(output, (tuple, list)) else output

    def take(self) -> list[Tensor | None]:
        """The features of the latest forward pass, in the order of the modules; they are not kept any longer.

        ``None`` stands for a module that has not run since.
        """
        features, self._outputs = self._outputs, [None] * len(self._outputs)
        return features


class DistillationModel(SRModel):
    """A student ``network_g`` that learns from images and from a frozen teacher ``network_t``.

    L = L_rec + L_TS + L_AD, each with the ``loss_weight`` of its section, at least one of the latter two:

    - ``train.pixel_opt``: L_rec, the student's output against the ground truth, logged as ``l_pix``; left out, no
      ground truth is needed, and the data may come from an ``LRImageDataset``;
    - ``train.distill_pixel_opt``: L_TS, the student's output against the teacher's, logged as ``l_distill``;
    - ``train.affinity_opt``: L_AD, features against the teacher's, logged as ``l_affinity``; ``layers`` names the
      modules, one list for both networks or ``{student: [...], teacher: [...]}``.

    The teacher runs in eval mode, in deploy form where its architecture has one. For testing no teacher is built. With
    ``network_t.precompute`` its outputs for whole images are made once, see :meth:`teach`, and it is not kept, unless
    ``train.affinity_opt`` needs its features.
    ``train.memory_format: channels_last`` runs both networks in that layout.

    Source: DSCLoRA (arXiv:2504.11271).

    Raises:
        InputError: No teacher or no loss from it, a layer that does not exist, features or outputs of the two
            networks that do not fit each other, or outputs that are not ``scale`` times the input.
    """

    precomputes = False  # in a test

    def __init__(self, opt: dict[str, Any]):
        self.lq: Tensor
        self.memory_format = memory_format(opt.get('train') or {})
        super().__init__(opt)

    def init_training_settings(self) -> None:
        faults = option_faults(self.opt)
        if faults:
            raise InputError('\n'.join(faults.values()))
        train_opt, path_opt = self.opt['train'], self.opt['path']
        self.ema_decay = train_opt.get('ema_decay', 0)
        if self.ema_decay > 0:
            # A copy, not a second network: the random lora_A of the student must be the average's, too.
            self.net_g_ema = deepcopy(self.get_bare_model(self.net_g)).eval().requires_grad_(False)
            start = path_opt.get('pretrain_network_g')
            if start is not None and Path(start).parent == Path(path_opt['models']):  # a run that goes on
                self.load_network(self.net_g_ema, start, path_opt.get('strict_load_g', True), 'params_ema')

        self._build_teacher()
        self._build_losses(train_opt)
        self._check_fit()
        if self.precomputes:
            stream = stream_of(self.opt)
            if stream is not None:
                self.teach(stream.dataset)
        self.net_g.train()
        self.setup_optimizers()
        self.setup_schedulers()

    def _build_teacher(self) -> None:
        path_opt = self.opt['path']
        section = dict(self.opt['network_t'])
        self.precomputes, self.self_ensemble = (section.pop(key, False) for key in TEACHER)
        teacher = build_network(section)
        path = path_opt['pretrain_network_t']
        load_weights(
            teacher, read_checkpoint(path), path, path_opt.get('param_key_t'), path_opt.get('strict_load_t', True)
        )
        self.teacher_key = teacher_key(teacher.state_dict(), section, self.self_ensemble) if self.precomputes else ''
        fold(teacher).eval().requires_grad_(False)
        lay_out(teacher.to(self.device), self.memory_format)
        self.net_t = teacher

    def _build_losses(self, train_opt: dict[str, Any]) -> None:
        def build(key: str) -> nn.Module | None:
            return build_loss(train_opt[key]).to(self.device) if train_opt.get(key) else None

        layers = None
        if train_opt.get('affinity_opt'):
            # Not BasicSR's to read: what is left in the section are the arguments of the loss.
            layers = train_opt['affinity_opt'].pop('layers', None)
        self.cri_pix = build('pixel_opt')
        self.cri_distill_pix = build('distill_pixel_opt')
        self.cri_affinity = build('affinity_opt')
        if self.cri_affinity is not None:
            self._tap_features(layers)

    def _tap_features(self, layers: Any) -> None:
        if isinstance(self.net_g, DataParallel):
            raise InputError(DATA_PARALLEL_REFUSED)
        names = affinity_layers(layers)
        self.student_tap = FeatureTap(find_modules(self.get_bare_model(self.net_g), names['student'], 'student'))
        self.teacher_tap = FeatureTap(find_modules(self.net_t, names['teacher'], 'teacher'))

    @torch.no_grad()
    def _check_fit(self) -> None:
        """Run both networks once on a blank patch of the training size: what does not fit must show before training."""
        scale = self.opt['scale']
        dataset = self.opt['datasets']['train']
        size = dataset.get('lq_size') or dataset.get('gt_size', 64 * scale) // scale
        channels = self.opt['network_g'].get('num_in_ch', 3)
        student = self.get_bare_model(self.net_g).eval()
        patch = torch.zeros(1, channels, size, size, device=self.device).contiguous(memory_format=self.memory_format)
        outputs = []
        for key, network in (('network_g', student), ('network_t', self.net_t)):
            output = network(patch)
            if output.shape[2:] != (size * scale, size * scale):
                raise InputError(
                    f'The option "scale" is {scale}, but {key} ({type(network).__name__}) makes '
                    f'{output.shape[3]}x{output.shape[2]} of {size}x{size}: give both networks the scale of the data.'
                )
            outputs.append(output)
        if outputs[0].shape != outputs[1].shape:
            raise InputError(
                f'network_g gives {outputs[0].shape[1]} channels, but network_t {outputs[1].shape[1]}: they have to be '
                'equal.'
            )
        if self.cri_affinity is not None:
            self.cri_affinity(self.student_tap.take(), self.teacher_tap.take())

    def teach(self, dataset: Any) -> None:
        """Make the outputs of the teacher for all images of a training set, as far as they are not there yet.

        They are stored beside its LR images, and the dataset gives the patch of them with each sample. A run calls this
        by itself; whoever has a loop of his own does so before the first batch.

        Args:
            dataset: A ``RawPairedImageDataset`` or ``RawLRImageDataset``.

        Raises:
            InputError: The teacher does not take these images, or the outputs cannot be written.
        """
        outputs = {}
        for root in dataset.lq.databases:
            path = place_of(root, self.teacher_key)
            try:
                precompute(self.net_t, root, path, self.opt['scale'], self.self_ensemble)
            except signals.Stopped as stopped:
                stream = stream_of(self.opt)
                get_root_logger().info(f'Stopped by {stopped.reason} before the first iteration.')
                record(self.opt, iter=0 if stream is None else stream.start.iteration, stopped=stopped.reason)
                raise
            outputs[root] = str(path)
        dataset.teach(outputs)
        if self.cri_affinity is None:
            del self.net_t

    def feed_data(self, data: dict[str, Any]) -> None:
        super().feed_data(data)
        self.taught: Tensor | None = None
        if self.precomputes and 'taught' in data:
            self.taught = data['taught'].to(self.device)

    def optimize_parameters(self, current_iter: int) -> None:
        self.optimizer_g.zero_grad()
        taught = self.taught
        if self.precomputes and taught is None:
            raise InputError(
                'network_t.precompute needs samples with the outputs of the teacher: call teach(dataset) of the model '
                'before the first batch.'
            )
        if taught is None or self.cri_affinity is not None:
            with torch.inference_mode():
                live = self.net_t(self.lq)
            taught = live.clone() if taught is None else taught  # one that a loss may keep for its backward pass
        self.output = self.net_g(self.lq)

        losses = OrderedDict()
        if self.cri_pix is not None:
            losses['l_pix'] = self.cri_pix(self.output, self.gt)
        if self.cri_distill_pix is not None:
            losses['l_distill'] = self.cri_distill_pix(self.output, taught)
        if self.cri_affinity is not None:
            losses['l_affinity'] = self.cri_affinity(self.student_tap.take(), self.teacher_tap.take())
        sum(losses.values()).backward()
        self.optimizer_g.step()

        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def test(self) -> None:
        # As in SwinIRModel: a network that works in windows wants whole windows.
        window = self.opt['network_g'].get('window_size')
        if not window:
            super().test()
            return
        lq = self.lq
        height, width = lq.shape[2:]
        self.lq = F.pad(lq, (0, -width % window, 0, -height % window), 'reflect')
        super().test()
        self.lq = lq
        scale = self.opt['scale']
        self.output = self.output[:, :, : height * scale, : width * scale]
