"""Degrading images during training, on any device."""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch

from lora_sr.basicsr.patches.tools import is_defective, patch, replace_everywhere


def patch_degradation_device() -> None:
    """``RealESRNetModel`` and ``RealESRGANModel`` call ``.cuda()`` on what degrades images and on their pool of pairs.

    Without one that is a crash, and with ``num_gpu: 0`` another device than the images'.
    """
    from basicsr.models.realesrgan_model import RealESRGANModel
    from basicsr.models.realesrnet_model import RealESRNetModel
    from basicsr.utils import DiffJPEG, USMSharp

    for model in (RealESRNetModel, RealESRGANModel):
        if is_defective(model.__init__, 'cuda'):
            model.__init__ = _set_up_degradations(model, DiffJPEG, USMSharp)
        if is_defective(model._dequeue_and_enqueue, 'cuda'):
            model._dequeue_and_enqueue = _pool_on_device(model._dequeue_and_enqueue)


def _set_up_degradations(model: Any, jpeg: type, sharpener: type) -> Callable[..., None]:
    @patch
    def __init__(self: Any, opt: dict[str, Any]) -> None:
        super(model, self).__init__(opt)
        self.jpeger = jpeg(differentiable=False).to(self.device)
        self.usm_sharpener = sharpener().to(self.device)
        self.queue_size = opt.get('queue_size', 180)

    return __init__


def _pool_on_device(original: Callable[..., None]) -> Callable[..., None]:
    @patch
    @functools.wraps(original)
    def _dequeue_and_enqueue(self: Any) -> None:
        # The original makes the pool, and complains of a size that is no multiple of the batch, where there is none.
        if not hasattr(self, 'queue_lr') and self.queue_size % len(self.lq) == 0:
            self.queue_lr = self.lq.new_zeros(self.queue_size, *self.lq.shape[1:])
            self.queue_gt = self.gt.new_zeros(self.queue_size, *self.gt.shape[1:])
            self.queue_ptr = 0
        original(self)

    return _dequeue_and_enqueue


def patch_views() -> None:
    """Views are taken of images with their channels last, which a CPU gives and then refuses to view.

    ``DiffJPEG`` gives such images to ``filter2D``, and SwinIR to ``VGGStyleDiscriminator``.
    """
    from basicsr.archs.discriminator_arch import VGGStyleDiscriminator
    from basicsr.utils import img_process_util

    def of_contiguous(original: Callable[..., Any]) -> Callable[..., Any]:
        @patch
        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return original(*(arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)

        return patched

    if is_defective(img_process_util.filter2D, 'view', without='contiguous'):
        replace_everywhere(img_process_util.filter2D, of_contiguous(img_process_util.filter2D))
    if is_defective(VGGStyleDiscriminator.forward, 'view', without='contiguous'):
        VGGStyleDiscriminator.forward = of_contiguous(VGGStyleDiscriminator.forward)
