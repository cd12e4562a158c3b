"""Distributed runs, also on CPUs."""

from __future__ import annotations

import functools
import os
import subprocess
from typing import Any

import torch
import torch.distributed as dist

from lora_sr.archs.layout import lay_out
from lora_sr.basicsr.patches.tools import is_defective, patch
from lora_sr.basicsr.step.settings import memory_format
from lora_sr.errors import InputError


def start_distributed(launcher: str, opt: dict[str, Any]) -> None:
    """Call BasicSR's ``init_dist`` with the option file's ``dist_params``; the backend is NCCL if they name none.

    Raises:
        InputError: NCCL where no GPU is there or wanted.
    """
    from basicsr.utils import dist_util

    params = dict(opt.get('dist_params') or {})
    backend = params.pop('backend', 'nccl')
    if backend == 'nccl' and (opt.get('num_gpu') == 0 or not torch.cuda.is_available()):
        raise InputError('dist_params.backend must be gloo for a run on CPUs, got nccl, which needs GPUs.')
    if launcher == 'pytorch':
        params.pop('port', None)  # torchrun chooses the port; the key is slurm's, and many option files have it
    dist_util.init_dist(launcher, backend=backend, **params)


def patch_distributed_start() -> None:
    """``_init_dist_pytorch`` and ``_init_dist_slurm`` divide by ``device_count()``: a crash where there is no GPU."""
    from basicsr.utils import dist_util

    @patch
    def init_pytorch(backend: str, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', os.environ['RANK'])) % torch.cuda.device_count())
        dist.init_process_group(backend=backend, **kwargs)

    @patch
    def init_slurm(backend: str, port: int | None = None) -> None:
        rank = int(os.environ['SLURM_PROCID'])
        nodes = os.environ['SLURM_NODELIST']
        if port is not None:
            os.environ['MASTER_PORT'] = str(port)
        os.environ.setdefault('MASTER_PORT', '29500')
        hosts = subprocess.run(['scontrol', 'show', 'hostname', nodes], capture_output=True, text=True, check=True)
        os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]
        os.environ['WORLD_SIZE'] = os.environ['SLURM_NTASKS']
        # The tasks of a node need not be neighbors by their ranks.
        local_rank = int(os.environ.get('SLURM_LOCALID', rank))
        os.environ['LOCAL_RANK'] = str(local_rank % max(1, torch.cuda.device_count()))
        os.environ['RANK'] = str(rank)
        init_pytorch(backend)

    if is_defective(dist_util._init_dist_pytorch, 'device_count', without='is_available'):
        dist_util._init_dist_pytorch = init_pytorch
    if is_defective(dist_util._init_dist_slurm, 'device_count', without='is_available'):
        dist_util._init_dist_slurm = init_slurm


def patch_model_to_device() -> None:
    """``BaseModel.model_to_device`` gives DistributedDataParallel a CUDA device even where the network is on the CPU.

    It also lets it send buffers round at each forward pass, in which the other processes take no part where the first
    one validates: a network with buffers, such as LoRA's alphas or SwinIR's masks, then waits for them or fails. They
    are constants here; where they are statistics, each process keeps its own.
    """
    from basicsr.models.base_model import BaseModel

    original = BaseModel.model_to_device
    if not is_defective(original, 'current_device', without='type'):
        return

    @patch
    @functools.wraps(original)
    def model_to_device(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        if self.opt.get('train'):  # before a wrapper lays out its gradients
            lay_out(net, memory_format(self.opt['train']))
        if self.opt['dist'] and self.device.type == 'cpu':
            find_unused = self.opt.get('find_unused_parameters', False)
            net = torch.nn.parallel.DistributedDataParallel(net.to('cpu'), find_unused_parameters=find_unused)
        else:
            net = original(self, net)
        if isinstance(net, torch.nn.parallel.DistributedDataParallel):
            net.broadcast_buffers = False
        return net

    BaseModel.model_to_device = model_to_device
