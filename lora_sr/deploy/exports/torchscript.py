"""A network as a TorchScript file, which runs without Python and without this package."""

from __future__ import annotations

import io
import json
import os

import torch

from lora_sr.checkpoints import NetworkLike
from lora_sr.deploy.exports.deployed import (
    FLOAT32_TOLERANCE,
    TRACED_SIZE,
    ExportReport,
    check_traceable,
    deployed_network,
    exporter_reason,
    tracing,
)
from lora_sr.errors import InputError
from lora_sr.files import check_output, write_whole

METADATA = 'metadata.json'


def export_torchscript(
    source: NetworkLike, output: str | os.PathLike[str], param_key: str | None = None, overwrite: bool = False
) -> ExportReport:
    """Write the deployed network of a checkpoint as TorchScript, for ``torch.jit.load``, libtorch and ncnn's pnnx.

    (N, C, H, W) -> (N, C, scale * H, scale * W) in float32, all sizes open. After loading it can be moved to another
    device and to half precision, but for SwinIR and ECBSR, which make tensors of their own, on the CPU in float32.
    ``metadata.json`` in the file has family, scale, channels, range of values and size multiple. The file is loaded
    again and run on images of three sizes before it is written.

    Args:
        source: Whatever :func:`lora_sr.load_network` takes; LoRA is merged and branches folded.
        output: The file to write, ``.pt``.
        param_key: Where the state dict is in a file; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.
        overwrite: Replace ``output`` where it exists.

    Raises:
        InputError: The checkpoint cannot be used, or its network cannot be traced; ``output`` exists, has another
            suffix or cannot be written; or the file's images differ from the network's by more than 1e-4 of the range
            of values. No file is left behind then.
    """
    check_output(output, ('.pt',), overwrite)
    deployed = deployed_network(source, param_key)
    check_traceable(deployed, 'TorchScript')
    buffer, loaded = io.BytesIO(), None
    try:
        with tracing():
            traced = torch.jit.trace(deployed.network, deployed.image(*TRACED_SIZE), check_trace=False)
            torch.jit.save(traced, buffer, _extra_files={METADATA: json.dumps(deployed.metadata())})
            buffer.seek(0)
            loaded = torch.jit.load(buffer)
        difference = deployed.difference(loaded)
    except Exception as error:  # whatever the tracer, or what it traced, makes of a network
        limits = None if loaded is None else deployed.limits(loaded)
        reason = limits or f'{deployed.family}: {exporter_reason(error)}'
        raise InputError(f'{deployed.name} cannot be exported as TorchScript: {reason}.') from error
    if not difference.largest <= FLOAT32_TOLERANCE:
        reason = deployed.limits(loaded) or f"the file's images differ from the network's by {difference}"
        raise InputError(f'{deployed.name} cannot be exported as TorchScript: {reason}.')
    write_whole(output, buffer.getvalue())
    return ExportReport(deployed, 'TorchScript, float32', difference, 'the file, loaded again,')
