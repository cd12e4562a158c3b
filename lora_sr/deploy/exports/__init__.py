"""Deployed networks as files for other programs: ONNX, TorchScript, and chaiNNer."""

from lora_sr.deploy.exports.chainner import export_chainner
from lora_sr.deploy.exports.onnx import export_onnx
from lora_sr.deploy.exports.torchscript import export_torchscript

__all__ = ['export_chainner', 'export_onnx', 'export_torchscript']
