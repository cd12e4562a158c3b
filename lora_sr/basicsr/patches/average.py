"""The exponential moving average (EMA) of networks with frozen parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_sr.basicsr.patches.tools import is_defective, is_patch, patch
from lora_sr.checkpoints.content import PARAM_KEYS, read_checkpoint, weights_for


def patch_average() -> None:
    """``init_training_settings`` builds the EMA network anew: what the file does not give is random there, too.

    That is ``lora_A``, and with ``strict_load_g: false`` every tensor that does not fit. There the average must start
    as a copy. ``setup_schedulers`` is the last step of every model's ``init_training_settings``, whichever model
    overrides it. A resumed run has the average of its checkpoint already.
    """
    from basicsr.models.base_model import BaseModel
    from basicsr.models.sr_model import SRModel

    original = BaseModel.setup_schedulers
    if not is_defective(SRModel.init_training_settings, 'build_network') or is_patch(original):
        return

    @patch
    @functools.wraps(original)
    def setup_schedulers(self: Any) -> None:
        original(self)
        average, path = getattr(self, 'net_g_ema', None), self.opt['path']
        if average is None or path.get('resume_state'):
            return
        own = self.get_bare_model(self.net_g).state_dict()
        given: dict[str, Any] = {}
        if path.get('pretrain_network_g') is not None:
            file = path['pretrain_network_g']
            content = read_checkpoint(file)
            given = weights_for(average, content, file, key_of_average(content, path)).state
        copied = {key: value for key, value in own.items() if key not in given or given[key].shape != value.shape}
        average.load_state_dict({**average.state_dict(), **copied})

    BaseModel.setup_schedulers = setup_schedulers


def key_of_average(content: Mapping[str, Any], path: Mapping[str, Any]) -> str | None:
    """Where a file has the average, for which stock models ask under ``params_ema`` whatever the file.

    In one of others' it is where ``param_key_g`` of the section ``path`` says.
    """
    is_of_basicsr = any(isinstance(content.get(key), Mapping) and content[key] for key in PARAM_KEYS)
    return 'params_ema' if is_of_basicsr else path.get('param_key_g', 'params')


def patch_average_of_frozen() -> None:
    """``model_ema`` rounds in every step, also what is frozen: the average's base drifts away from the network's.

    It also takes two small kernels for each tensor, where few for all of them do.
    """
    from basicsr.models.base_model import BaseModel

    if not is_defective(BaseModel.model_ema, 'mul_', without='requires_grad'):
        return

    @patch
    def model_ema(self: Any, decay: float = 0.999) -> None:
        own = dict(self.get_bare_model(self.net_g).named_parameters())
        tensors: dict[float, tuple[list[Tensor], list[Tensor]]] = {1 - decay: ([], []), 1.0: ([], [])}
        for name, average in self.net_g_ema.named_parameters():
            averages, weights = tensors[1 - decay if own[name].requires_grad else 1.0]  # 1 is to copy
            averages.append(average.data)
            weights.append(own[name].data)
        for weight, lists in tensors.items():
            if lists[0]:
                torch._foreach_lerp_(*lists, weight)

    BaseModel.model_ema = model_ema
