"""From a trained checkpoint to the plain checkpoint that is run."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from lora_sr.adapters import count_parameters, lora_layers, merge_lora
from lora_sr.archs import load_network
from lora_sr.errors import InputError

TOLERANCE = 1e-5
SUFFIXES = ('.pth', '.safetensors')


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_checkpoint` measured."""

    network: str
    layers: int
    lora_parameters: int
    merged_parameters: int
    difference: float

    def __str__(self) -> str:
        share = self.lora_parameters / (self.lora_parameters + self.merged_parameters)
        return (
            f'network               {self.network}\n'
            f'layers with LoRA      {self.layers}\n'
            f'parameters, merged    {self.merged_parameters:,}\n'
            f'trainable in LoRA     {self.lora_parameters:,} ({share:.1%} of the adapted network)\n'
            f'largest difference    {self.difference:.2e} (adapted against merged output, range [0, 1])'
        )


def merge_checkpoint(
    checkpoint: str | os.PathLike, output: str | os.PathLike, param_key: str | None = None, overwrite: bool = False
) -> MergeReport:
    """Merge the LoRA of an adapted checkpoint and write the plain network's checkpoint.

    The written file is loaded again, into the stock network, and compared with the adapted network on random images.

    Args:
        checkpoint: An adapted checkpoint, see :func:`lora_sr.archs.load_network`.
        output: The file to write, ``.pth`` (state dict under ``params``) or ``.safetensors``.
        param_key: Where the state dict is in ``checkpoint``; by default ``params_ema``, else ``params``.
        overwrite: Replace ``output`` where it exists.

    Raises:
        InputError: ``checkpoint`` cannot be read or carries no LoRA; ``output`` exists, has another suffix or cannot
            be written; or the outputs differ by more than 1e-5. No file is left behind then.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise InputError(f'The output {output} must end in {" or ".join(SUFFIXES)}.')
    if output.exists() and not overwrite:
        raise InputError(f'The output {output} exists: choose another name, or allow it with --overwrite.')
    if not output.parent.is_dir():
        raise InputError(f'The folder {output.parent} of the output does not exist.')

    adapted = load_network(checkpoint, param_key)
    layers = sum(1 for _ in lora_layers(adapted))
    if not layers:
        raise InputError(f'{checkpoint} carries no LoRA: there is nothing to merge.')
    merged = merge_lora(deepcopy(adapted))

    # Written beside the output and renamed when it has proved itself, so that no doubtful file bears the name.
    partial = output.with_name(f'.{output.stem}.partial{output.suffix}')
    try:
        _write(merged, partial)
        difference = _largest_difference(adapted, load_network(partial))
        if not difference <= TOLERANCE:
            raise InputError(
                f'The merged network differs from the adapted one by {difference:.2e}, more than '
                f'{TOLERANCE:.0e}: {checkpoint} has weights too large for float32, or NaN.'
            )
        os.replace(partial, output)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
        reason = getattr(error, 'strerror', None) or 'the disk may be full'
        raise InputError(f'The output {output} cannot be written: {reason}.') from error
    finally:
        partial.unlink(missing_ok=True)
    return MergeReport(
        network=type(load_network(output)).__name__,
        layers=layers,
        lora_parameters=count_parameters(adapted).lora,
        merged_parameters=count_parameters(merged).total,
        difference=difference,
    )


def _write(network: nn.Module, path: Path) -> None:
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with open(path, 'wb') as file:
        if path.suffix == '.safetensors':
            file.write(save(state))
        else:
            torch.save({'params': state}, file)


@torch.no_grad()
def _largest_difference(first: nn.Module, second: nn.Module) -> float:
    images = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    return (first(images) - second(images)).abs().max().item()
