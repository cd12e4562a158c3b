"""A network as an ONNX file, proved by onnxruntime."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable

import torch
from torch import Tensor

from lora_sr.checkpoints import NetworkLike
from lora_sr.deploy.exports.deployed import (
    FLOAT32_TOLERANCE,
    TRACED_SIZE,
    Deployed,
    ExportReport,
    check_traceable,
    deployed_network,
    exporter_reason,
    tracing,
)
from lora_sr.errors import InputError
from lora_sr.files import check_output, write_whole

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

# The first with LayerNormalization as one node. onnxruntime has it since 1.12, TensorRT since 8.6.
OPSET = 17
DTYPES = ('float32', 'float16')
FLOAT16_PSNR = 60.0  # dB; it changes a PSNR of 35 dB by some 0.01 dB


def export_onnx(
    source: NetworkLike,
    output: str | os.PathLike[str],
    dtype: str = 'float32',
    param_key: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the deployed network of a checkpoint as ONNX: opset 17, ``input`` (N, C, H, W) -> ``output``, both float32.

    N, H and W are open. The file's metadata have family, scale, channels, range of values, size multiple, and dtype. It
    is run by onnxruntime on images of three sizes before it is written.

    Args:
        source: Whatever :func:`lora_sr.load_network` takes; LoRA is merged and branches folded.
        output: The file to write, ``.onnx``.
        dtype: ``float32``, or ``float16`` for weights and features; the images stay float32. A runtime may also
            lower a float32 file itself: LKDN's values fit float16 in both.
        param_key: Where the state dict is in a file; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.
        overwrite: Replace ``output`` where it exists.

    Raises:
        InputError: onnx or onnxruntime is not installed; the checkpoint cannot be used, or its network cannot be
            traced; ``output`` exists, has another suffix or cannot be written; or the file's images differ from the
            network's, by more than 1e-4 of the range of values in float32, or with a PSNR below 60 dB in float16. No
            file is left behind then.
    """
    check_output(output, ('.onnx',), overwrite)
    if dtype not in DTYPES:
        raise InputError(f'"dtype" of an ONNX file is {dtype!r}: it must be one of {", ".join(DTYPES)}.')
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(f'The export to ONNX needs {error.name}: pip install "lora-sr[onnx]".') from error
    deployed = deployed_network(source, param_key)
    check_traceable(deployed, 'ONNX')
    model, run = onnx.load_from_string(_trace(deployed)), None
    try:
        if dtype == 'float16':
            model = _to_float16(model)
        onnx.helper.set_model_props(model, {**deployed.metadata(), 'dtype': dtype})
        onnx.checker.check_model(model, full_check=True)
        data = model.SerializeToString()
        run = _runner(data)
        difference = deployed.difference(run)
    except Exception as error:  # whatever converter, checker and runtime make of a graph that is wrong
        limits = None if run is None or dtype != 'float32' else deployed.limits(run)
        reason = limits or f'onnxruntime does not run it: {exporter_reason(error)}'
        raise InputError(f'{deployed.name} cannot be exported as ONNX: {reason}.') from error
    if dtype == 'float16' and not difference.psnr >= FLOAT16_PSNR:
        raise InputError(
            f'{deployed.name} is not exact enough in float16: its images have a PSNR of {difference.psnr:.1f} dB to '
            f'those in float32, where {FLOAT16_PSNR:.0f} dB are right; export it in float32.'
        )
    if dtype == 'float32' and not difference.largest <= FLOAT32_TOLERANCE:
        reason = deployed.limits(run) or f"the file's images differ from the network's by {difference}"
        raise InputError(f'{deployed.name} cannot be exported as ONNX: {reason}.')
    write_whole(output, data)
    inside = '' if dtype == 'float32' else ', images in and out float32'
    return ExportReport(deployed, f'ONNX, opset {OPSET}, {dtype}{inside}', difference, 'onnxruntime')


def _trace(deployed: Deployed) -> bytes:
    # The exporter by tracing is in every torch from 2.0 on, and takes the graph as it is; newer ones have to be told.
    by_tracing: dict[str, Any] = (
        {'dynamo': False} if 'dynamo' in inspect.signature(torch.onnx.export).parameters else {}
    )
    buffer = io.BytesIO()
    try:
        with tracing(), _without_log(), contextlib.redirect_stdout(io.StringIO()):  # on which older torch shows graphs
            torch.onnx.export(
                deployed.network,
                (deployed.image(*TRACED_SIZE),),
                buffer,  # type: ignore[arg-type]  # newer stubs know no buffers, which tracing writes to
                input_names=['input'],
                output_names=['output'],
                opset_version=OPSET,
                dynamic_axes={
                    'input': {0: 'batch', 2: 'height', 3: 'width'},
                    'output': {0: 'batch', 2: 'output_height', 3: 'output_width'},
                },
                **by_tracing,
            )
    except Exception as error:  # whatever an exporter makes of a network that it cannot trace
        raise InputError(
            f'{deployed.name} cannot be exported as ONNX: {deployed.family}: {exporter_reason(error)}.'
        ) from error
    return buffer.getvalue()


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """torch shows the whole graph of what it cannot export, past Python's own output."""
    log = getattr(torch._C, '_jit_onnx_log', None)
    if log is not None:
        torch._C._jit_onnx_log = lambda *values: None
    try:
        yield
    finally:
        if log is not None:
            torch._C._jit_onnx_log = log


def _to_float16(model: ModelProto) -> ModelProto:
    """The model with weights and features in float16, and float32 images."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # weights below 6e-8 are rounded to that
        model = convert_float_to_float16(model, keep_io_types=True)
    _sort(model.graph)  # it appends its casts at the end, but nodes have to stand behind what they take
    return model


def _sort(graph: GraphProto) -> None:
    """Put the nodes of a graph in an order in which each stands behind those whose outputs it takes."""
    waiting, known = list(graph.node), {''}
    known.update(value.name for value in (*graph.input, *graph.initializer))
    del graph.node[:]
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        if not ready:
            raise ValueError(f'nothing gives the inputs of {waiting[0].name}')
        graph.node.extend(ready)
        known.update(output for node in ready for output in node.output)
        waiting = [node for node in waiting if not known.issuperset(node.output)]


def _runner(data: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # fatal; what a run fails of is told by its exception
    session = onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])
    silent = onnxruntime.RunOptions()
    silent.log_severity_level = 4

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(['output'], {'input': image.numpy()}, silent)[0])

    return run
