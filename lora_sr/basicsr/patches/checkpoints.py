"""Checkpoints: read without running code, written whole or not at all, with LoRA or without."""

from __future__ import annotations

import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_sr.adapters import is_lora_key
from lora_sr.basicsr import kept, progress, provenance, resume
from lora_sr.basicsr.patches.average import key_of_average
from lora_sr.basicsr.patches.divergence import check_optimizers, check_weights
from lora_sr.basicsr.patches.tools import is_defective, is_patch, patch, replace_everywhere, swapped
from lora_sr.basicsr.records import record
from lora_sr.basicsr.step.training_step import take_charge
from lora_sr.checkpoints.content import forget, load_weights, read_checkpoint
from lora_sr.checkpoints.origin import KEY, fingerprint
from lora_sr.checkpoints.unwrapping import bare_weights
from lora_sr.files import save_atomically


def patch_load_network() -> None:
    """``BaseModel.load_network`` unpickles anything, and answers a wrong file with a traceback.

    Weights are found as everywhere, see :func:`lora_sr.checkpoints.unwrapping.find_weights`.
    """
    from basicsr.models.base_model import BaseModel

    if not is_defective(BaseModel.load_network, 'load', without='weights_only'):
        return

    @patch
    def load_network(
        self: Any, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
    ) -> None:
        content = read_checkpoint(load_path)
        if net is getattr(self, 'net_g_ema', None):
            param_key = key_of_average(content, self.opt['path'])
        bare = self.get_bare_model(net)
        load_weights(bare, content, load_path, param_key, strict, self._print_different_keys_loading)
        if self.is_train and net is getattr(self, 'net_g', None):
            resumed = content.origin if Path(load_path).parent == Path(self.opt['path'].get('models', '')) else None
            self.base_fingerprint = fingerprint(bare.state_dict()) if resumed is None else resumed.base

    BaseModel.load_network = load_network


def patch_weights_of_parts() -> None:
    """SpyNet, TOFlow's, EDVR's features in IconVSR, DFDNet's dictionary and VGG unpickle anything themselves."""
    from basicsr.archs import basicvsr_arch, dfdnet_arch, spynet_arch, tof_arch, vgg_arch

    for network in (
        spynet_arch.SpyNet,
        tof_arch.SPyNetTOF,
        basicvsr_arch.EDVRFeatureExtractor,
        dfdnet_arch.DFDNet,
        vgg_arch.VGGFeatureExtractor,
    ):
        if is_defective(network.__init__, 'load', without='weights_only'):
            network.__init__ = _loading_safely(network.__init__)


def _loading_safely(original: Any) -> Any:
    """A constructor in whose module ``torch.load`` is ours for a while."""

    @patch
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with swapped(original.__globals__, torch=_SafeTorch()):
            original(self, *args, **kwargs)

    return __init__


class _SafeTorch:
    """``torch``, but for its ``load``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(path: str, **_: Any) -> dict[str, Any]:
        return dict(read_checkpoint(path))


def patch_saving() -> None:
    """``save_network`` and ``save_training_state`` write in place and only log a failure, at the cost of the result."""
    from basicsr.models.base_model import BaseModel
    from basicsr.utils.dist_util import master_only

    @patch
    @master_only
    def save_network(
        self: Any,
        net: nn.Module | list[nn.Module],
        net_label: str,
        current_iter: int,
        param_key: str | list[str] = 'params',
    ) -> None:
        if kept.ending_of(self) and net_label != 'net_g':
            return
        nets = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        assert len(nets) == len(keys), 'The lengths of net and param_key should be the same.'
        check_weights(self, net_label, nets)
        content: dict[str, Any] = {}
        for one, key in zip(nets, keys):
            content[key] = bare_weights(self.get_bare_model(one).state_dict())
        origin = provenance.origin(self, net_label, current_iter, content[keys[0]])
        content[KEY] = origin.to_dict()
        ending = kept.ending_of(self) or ('latest' if current_iter == -1 else current_iter)
        with kept.timed(self, current_iter):
            save_atomically(content, os.path.join(self.opt['path']['models'], f'{net_label}_{ending}.pth'))

    @patch
    @master_only
    def save_training_state(self: Any, epoch: int, current_iter: int) -> None:
        if kept.ending_of(self):
            return
        if current_iter == -1:  # the networks are saved
            progress.close()
            record(self.opt, iter=getattr(self, 'current_iter', 0), finished=True)
            return
        check_optimizers(self)
        state = {
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            KEY: {
                **provenance.origin(self, 'net_g', current_iter, {}).to_dict(),
                **resume.record(self, epoch, current_iter),
            },
        }
        with kept.timed(self, current_iter):
            save_atomically(state, os.path.join(self.opt['path']['training_states'], f'{current_iter}.state'))
        kept.remove_older(self, current_iter)

    for patched in (save_network, save_training_state):
        if is_defective(getattr(BaseModel, patched.__name__), 'save', without='replace'):
            setattr(BaseModel, patched.__name__, patched)


def patch_frozen_warnings() -> None:
    """``SRModel.setup_optimizers`` logs a warning for every frozen tensor: with LoRA, nearly all of them."""
    from basicsr.models.sr_model import SRModel

    original = SRModel.setup_optimizers
    if not is_defective(original, 'named_parameters'):
        return

    @patch
    @functools.wraps(original)
    def setup_optimizers(self: Any) -> None:
        def is_kept(record: logging.LogRecord) -> bool:
            return not re.match('Params .* will not be optimized', record.getMessage())

        logger = logging.getLogger('basicsr')
        logger.addFilter(is_kept)
        try:
            original(self)
        finally:
            logger.removeFilter(is_kept)
        trains = [parameter.requires_grad for parameter in self.net_g.parameters()]
        if not all(trains):
            logger.warning('%d of %d parameter tensors are frozen.', len(trains) - sum(trains), len(trains))

    SRModel.setup_optimizers = setup_optimizers


def patch_missing_lora_warnings() -> None:
    """``_print_different_keys_loading`` warns of every LoRA tensor that a base checkpoint, rightly, does not have."""
    from basicsr.models.base_model import BaseModel

    original = BaseModel._print_different_keys_loading
    if not is_defective(original, 'warning'):
        return

    @patch
    @functools.wraps(original)
    def _print_different_keys_loading(
        self: Any, crt_net: nn.Module, load_net: dict[str, Any], strict: bool = True
    ) -> None:
        if strict and not any(map(is_lora_key, load_net)):
            own = self.get_bare_model(crt_net).state_dict()
            load_net = {**load_net, **{key: value for key, value in own.items() if is_lora_key(key)}}
        original(self, crt_net, load_net, strict)

    BaseModel._print_different_keys_loading = _print_different_keys_loading


def patch_build_model() -> None:
    """Checkpoints that were read for the check of the options are given to the model, and not kept any longer.

    What ``train`` says of the step is read by no model of BasicSR's.
    """
    from basicsr import models

    original = models.build_model
    if is_patch(original):
        return

    @patch
    @functools.wraps(original)
    def build_model(opt: dict[str, Any]) -> Any:
        try:
            model = original(opt)
        finally:
            forget()
        if opt['is_train']:
            take_charge(model)
        return model

    replace_everywhere(original, build_model)
