"""The deployed network, ready to run as fast as the hardware allows."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from lora_sr.deploy.check_images import soft_image
from lora_sr.deploy.half_range import fit_half_range
from lora_sr.deploy.merge import deploy_form
from lora_sr.deploy.native.networks import compile_network
from lora_sr.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_GRAPHS = 8  # sizes of which a GPU keeps the recorded pass


def optimize(network: nn.Module, dtype: torch.dtype = torch.float32) -> DeployedNetwork:
    """The deploy form of a network, ready to run on the device where its parameters are.

    - On a CPU, SPAN (and so DSCLoRA) and LKDN run on kernels of ours, which are compiled for the machine once, in some
      two seconds, and kept (see :mod:`lora_sr.deploy.native`): convolutions, activations, gates, concatenations and
      the pixel shuffle without a copy between them. Any size runs at once; of the last size the memory is kept. Other
      networks, and all where there is no C++ compiler, run by torch in the channels-last format.
    - On a CUDA GPU, the network is compiled by ``torch.compile`` at its first pass, for all sizes at once, in
      the channels-last format. The second pass of a size is recorded as a CUDA graph, and replayed from then on; the
      last 8 sizes are kept.

    Args:
        network: Any network, (N, C, H, W) -> (N, C', s * H, s * W), in training or in deploy form, with LoRA or
            without. It is not changed.
        dtype: ``torch.float32``; ``torch.bfloat16``, which pays on CPUs with AVX512-BF16 and on GPUs; or
            ``torch.float16``, for GPUs. Images are float32 in any case.

    Returns:
        A module that takes and gives what ``network`` does, in float32, without gradients.

    Raises:
        InputError: Another dtype, float16 on a CPU, or as :func:`lora_sr.archs.fold` does.
    """
    if dtype not in DTYPES:
        raise InputError(f'A network runs in {", ".join(map(str, DTYPES))}, not in {dtype}.')
    device = next(network.parameters()).device
    if device.type == 'cpu' and dtype == torch.float16:
        raise InputError('float16 is for GPUs: on a CPU the half precision is bfloat16.')
    network = deploy_form(network)
    if dtype == torch.float16:
        fit_half_range(network, [soft_image(1, 3, 64, 64).to(device)])
    return DeployedNetwork(network, dtype)


class DeployedNetwork(nn.Module):
    """What :func:`optimize` makes.

    Args:
        network: In deploy form, see :func:`lora_sr.deploy.merge.deploy_form`. It is what the state dict has.
        dtype: What is computed in.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.network = network
        self._prepare()
        self.register_load_state_dict_post_hook(_prepare_again)

    def _prepare(self) -> None:
        self._program = self._graphs = None
        device = next(self.network.parameters()).device
        if device.type == 'cpu':
            self._program = compile_network(self.network, self.dtype)
        if self._program is None:
            self.network.to(dtype=self.dtype, memory_format=torch.channels_last)
        if device.type == 'cuda':
            self._graphs = _GraphPerSize(torch.compile(self.network, dynamic=True))

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_program': None, '_graphs': None}  # they hold addresses; a copy makes its own

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._prepare()

    @property
    def engine(self) -> str:
        """What computes: ``kernels`` of ours, ``torch.compile``, or ``torch``."""
        if self._program is not None:
            return 'kernels'
        return 'torch' if self._graphs is None else 'torch.compile'

    @torch.inference_mode()
    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', s * H, s * W), in float32."""
        if self._program is not None:
            return self._program(image)
        image = image.to(dtype=self.dtype).contiguous(memory_format=torch.channels_last)
        return (self.network if self._graphs is None else self._graphs)(image).float()


def _prepare_again(module: DeployedNetwork, keys) -> None:
    """Other weights need another program: the kernels have copies of them."""
    module._prepare()


class _GraphPerSize:
    """Runs a network on a GPU, and records the passes that come again as CUDA graphs."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.graphs: OrderedDict[torch.Size, tuple | None] = OrderedDict()  # None: of one pass so far

    def __call__(self, image: Tensor) -> Tensor:
        size = image.shape
        # What cuDNN finds to be the fastest for a size is used again in all of its passes.
        allow_tf32 = torch.backends.cudnn.allow_tf32
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allow_tf32):
            if size not in self.graphs:
                if len(self.graphs) == MOST_GRAPHS:
                    self.graphs.popitem(last=False)
                self.graphs[size] = None
                return self.network(image)
            if self.graphs[size] is None:
                self.graphs[size] = self._record(image)
        self.graphs.move_to_end(size)
        graph, source, result = self.graphs[size]
        source.copy_(image)
        graph.replay()
        return result.clone()

    def _record(self, image: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        source = image.clone(memory_format=torch.preserve_format)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is allocated or chosen at a first pass must not be recorded
            self.network(source)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.network(source)
        return graph, source, result
