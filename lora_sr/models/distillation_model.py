"""Training of a student network under a teacher."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from copy import deepcopy

import torch
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from lora_sr.archs import fold, read_state_dict
from lora_sr.checkpoint_file import load_weights
from lora_sr.errors import InputError

MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


class FeatureTap:
    """Keeps what the named modules of a network gave in its latest forward pass.

    Args:
        network: The network to listen to.
        layers: Names of its modules. Of a module that returns several tensors, the first is kept.
        role: What the network is, for messages, e.g. 'student'.

    Raises:
        InputError: A name that the network does not have; near names are listed.
    """

    def __init__(self, network: nn.Module, layers: list[str], role: str):
        modules = dict(network.named_modules())
        self.layers = list(layers)
        self._outputs: dict[str, Tensor] = {}
        for layer in self.layers:
            if layer not in modules or not layer:
                near = difflib.get_close_matches(layer, modules, n=4, cutoff=0.3) or list(modules)[1:5]
                raise InputError(
                    f'train.affinity_opt.layers names "{layer}", which the {role} '
                    f'{type(network).__name__} does not have; near names are {", ".join(near)}.'
                )
            modules[layer].register_forward_hook(self._keep(layer))

    def _keep(self, layer: str):
        def hook(module, inputs, output):
            self._outputs[layer] = output[0] if isinstance(output, (tuple, list)) else output

        return hook

    def features(self) -> list[Tensor]:
        """The features of the latest forward pass, in the order of the layers."""
        return [self._outputs[layer] for layer in self.layers]


@MODEL_REGISTRY.register()
class DistillationModel(SRModel):
    """A student ``network_g`` that learns from images and from a frozen teacher ``network_t``.

    L = L_rec + L_TS + L_AD, each with the ``loss_weight`` of its section, at least one of the latter two:

    - ``train.pixel_opt``: L_rec, the student's output against the ground truth, logged as ``l_pix``;
    - ``train.distill_pixel_opt``: L_TS, the student's output against the teacher's, logged as ``l_distill``;
    - ``train.affinity_opt``: L_AD, features against the teacher's, logged as ``l_affinity``; ``layers`` names the
      modules, one list for both networks or ``{student: [...], teacher: [...]}``.

    The teacher runs in eval mode, in deploy form where its architecture has one. For testing no teacher is built.
    ``train.memory_format: channels_last`` runs both networks in that layout.

    Source: DSCLoRA (arXiv:2504.11271).

    Raises:
        InputError: No teacher or no loss from it, a layer that does not exist, features or outputs of the two
            networks that do not fit each other, or outputs that are not ``scale`` times the input.
    """

    def __init__(self, opt):
        name = (opt.get('train') or {}).get('memory_format') or 'contiguous'
        if name not in MEMORY_FORMATS:
            raise InputError(f'train.memory_format is "{name}": it must be one of {", ".join(MEMORY_FORMATS)}.')
        self.memory_format = MEMORY_FORMATS[name]
        super().__init__(opt)

    def model_to_device(self, net):
        return super().model_to_device(net.to(memory_format=self.memory_format))

    def init_training_settings(self):
        train_opt = self.opt['train']
        self._build_teacher()
        self._build_losses(train_opt)
        self._check_fit()
        self.net_g.train()

        self.ema_decay = train_opt.get('ema_decay', 0)
        if self.ema_decay > 0:
            # A copy, not a second network: the random lora_A of the student must be the average's, too.
            self.net_g_ema = deepcopy(self.get_bare_model(self.net_g)).eval().requires_grad_(False)
            if self.opt['path'].get('resume_state'):
                self.load_network(self.net_g_ema, self.opt['path']['pretrain_network_g'], True, 'params_ema')

        self.setup_optimizers()
        self.setup_schedulers()

    def _build_teacher(self):
        path_opt = self.opt['path']
        if not self.opt.get('network_t') or not path_opt.get('pretrain_network_t'):
            raise InputError(
                'DistillationModel needs a trained teacher: give "network_t" and "path: pretrain_network_t".'
            )
        teacher = build_network(self.opt['network_t'])
        path = path_opt['pretrain_network_t']
        state = read_state_dict(path, path_opt.get('param_key_t'))
        load_weights(teacher, state, path, strict=path_opt.get('strict_load_t', True))
        fold(teacher).eval().requires_grad_(False)
        self.net_t = teacher.to(self.device, memory_format=self.memory_format)

    def _build_losses(self, train_opt):
        def build(key):
            return build_loss(train_opt[key]).to(self.device) if train_opt.get(key) else None

        layers = None
        if train_opt.get('affinity_opt'):
            # Not BasicSR's to read: what is left in the section are the arguments of the loss.
            layers = train_opt['affinity_opt'].pop('layers', None)
        self.cri_pix = build('pixel_opt')
        self.cri_distill_pix = build('distill_pixel_opt')
        self.cri_affinity = build('affinity_opt')
        if self.cri_distill_pix is None and self.cri_affinity is None:
            raise InputError(
                'DistillationModel learns nothing from its teacher: give "train: distill_pixel_opt", '
                '"train: affinity_opt", or both (or use SRModel).'
            )
        if self.cri_affinity is not None:
            self._tap_features(layers)

    def _tap_features(self, layers):
        if isinstance(self.net_g, DataParallel):
            raise InputError(
                'train.affinity_opt does not work with DataParallel: start one process a GPU, with --launcher pytorch.'
            )
        pair = layers if isinstance(layers, dict) else {'student': layers, 'teacher': layers}
        for role in ('student', 'teacher'):
            if set(pair) != {'student', 'teacher'} or not isinstance(pair[role], list) or not pair[role]:
                raise InputError(
                    'train.affinity_opt.layers must be a list of module names, or '
                    f'{{student: [...], teacher: [...]}} with two such lists, not {layers!r}.'
                )
        if len(pair['student']) != len(pair['teacher']):
            raise InputError(
                f'train.affinity_opt.layers has {len(pair["student"])} layers of the student and '
                f'{len(pair["teacher"])} of the teacher: they are compared one by one.'
            )
        self.student_tap = FeatureTap(self.get_bare_model(self.net_g), pair['student'], 'student')
        self.teacher_tap = FeatureTap(self.net_t, pair['teacher'], 'teacher')

    @torch.no_grad()
    def _check_fit(self):
        """Run both networks once on a blank patch of the training size: what does not fit must show before training."""
        scale = self.opt['scale']
        size = self.opt['datasets']['train']['gt_size'] // scale
        student = self.get_bare_model(self.net_g).eval()
        patch = torch.zeros(1, 3, size, size, device=self.device).contiguous(memory_format=self.memory_format)
        for key, network in (('network_g', student), ('network_t', self.net_t)):
            output = network(patch)
            if output.shape[2:] != (size * scale, size * scale):
                raise InputError(
                    f'The option "scale" is {scale}, but {key} ({type(network).__name__}) makes '
                    f'{output.shape[2]}x{output.shape[3]} of {size}x{size}: give both networks the '
                    'scale of the data.'
                )
        if self.cri_affinity is not None:
            self.cri_affinity(self.student_tap.features(), self.teacher_tap.features())

    def feed_data(self, data):
        super().feed_data(data)
        self.lq = self.lq.contiguous(memory_format=self.memory_format)

    def optimize_parameters(self, current_iter):
        self.optimizer_g.zero_grad()
        with torch.no_grad():
            taught = self.net_t(self.lq)
        self.output = self.net_g(self.lq)

        losses = OrderedDict()
        if self.cri_pix is not None:
            losses['l_pix'] = self.cri_pix(self.output, self.gt)
        if self.cri_distill_pix is not None:
            losses['l_distill'] = self.cri_distill_pix(self.output, taught)
        if self.cri_affinity is not None:
            losses['l_affinity'] = self.cri_affinity(self.student_tap.features(), self.teacher_tap.features())
        sum(losses.values()).backward()
        self.optimizer_g.step()

        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)
