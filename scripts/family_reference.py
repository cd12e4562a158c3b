"""``docs/families.md``: what can be done with the networks that are known, found out by doing it.

``python scripts/family_reference.py`` builds a small random network of each family, tries each cell of the table on it,
and writes the page. Those of spandrel are the ones that the tests have. It takes some minutes.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lora_sr
from lora_sr.adapters import LoRAConfig, add_lora, is_lora_key, mark_trainable, without_lora
from lora_sr.archs import network_info
from lora_sr.checkpoints import load_network
from lora_sr.checkpoints.building import build_network
from lora_sr.checkpoints.families import FAMILIES, OURS
from lora_sr.checkpoints.layouts import in_layout, layout_of
from lora_sr.checkpoints.origin import Origin
from lora_sr.deploy.exports import export_chainner, export_onnx, export_torchscript
from lora_sr.deploy.merge import merge_checkpoint
from lora_sr.errors import InputError
from lora_sr.runtime import Upscaler

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT = REPOSITORY / 'docs' / 'families.md'
COMMAND = 'python scripts/family_reference.py'
sys.path.insert(0, str(REPOSITORY / 'tests'))

from community_networks import SMALL  # noqa: E402

# The section of a small network of each family, for an option file.
SECTIONS: dict[str, dict[str, Any]] = {
    'DSCLoRA': {'feature_channels': 8, 'upscale': 2, 'rank': 2},
    'SPAN': {'feature_channels': 8, 'upscale': 2},
    'SPANF': {'feature_channels': 8, 'upscale': 2},
    'SPANV2': {'feature_channels': 8, 'upscale': 2},
    'DISP': {'feature_channels': 8, 'upscale': 2, 'num_block': 2},
    'DSCFFused': {'feature_channels': 8, 'upscale': 2},
    'LKDN': {'num_feat': 8, 'num_atten': 8, 'num_block': 2, 'num_in': 2, 'upscale': 2},
    'SwinIR': {
        **{'embed_dim': 12, 'depths': [2], 'num_heads': [2], 'window_size': 4, 'img_size': 8, 'mlp_ratio': 2},
        **{'upscale': 2, 'upsampler': 'pixelshuffledirect'},
    },
    'RRDBNet': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1},
    'EDSR': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 2, 'upscale': 2},
    'RCAN': {
        **{'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_group': 1, 'num_block': 2, 'squeeze_factor': 4},
        'upscale': 2,
    },
    'MSRResNet': {'num_feat': 8, 'num_block': 2, 'upscale': 4},
    'SRVGGNetCompact': {'num_feat': 8, 'num_conv': 2, 'upscale': 2},
    'RIDNet': {'in_channels': 3, 'mid_channels': 16, 'out_channels': 3, 'num_block': 1},
    'ECBSR': {
        **{'num_in_ch': 3, 'num_out_ch': 3, 'num_block': 2, 'num_channel': 8, 'with_idt': False},
        **{'act_type': 'prelu', 'scale': 2},
    },
}
COLUMNS = ('loads', 'upscales', 'is adapted', 'merges back', 'ONNX', 'TorchScript', 'chaiNNer', 'kernels')
LIMITS = {'one image at a time': 'one image', 'one size alone': 'one size'}

INTRODUCTION = f"""\
# Families of networks

<!-- Written by `{COMMAND}`; change that script instead. -->

A file of weights is recognized by the names and shapes in it, whatever trainer has written it and wherever in it they
are. Each cell below was tried on a small network of random weights:

- **loads**: `lora_sr.load_network(FILE)` builds the network, with all weights of the file.
- **upscales**: `lora-sr upscale` runs it, on images of any size.
- **is adapted**: LoRA goes onto its layers (`groups: [all]`), and training moves it ([AdaptSR](adaptsr.md)).
- **merges back**: `lora-sr merge` of what was trained gives a file with the names and shapes of the one it began with.
- **ONNX, TorchScript, chaiNNer**: `lora-sr export` ([exporting](exporting.md)). *one image* and *one size*: what torch
  traces is right for one image at a time, or for the traced size, alone. It is refused, as all else that is not right.
- **kernels**: `lora_sr.optimize` runs it on our own CPU kernels ([performance](performance.md)); torch runs the others.

*folded*: what is written is the deploy form, without branches, as it is run.
"""

GROUPS = (
    ('Of this package', ''),
    ('Of BasicSR', 'They need BasicSR, and are built by its own classes.'),
    (
        'Of spandrel',
        'What is not known above is recognized, and built from its names and shapes, by\n'
        '[spandrel](https://github.com/chaiNNer-org/spandrel), which has to be installed. In 16 bits such a network '
        'runs where spandrel\nsays that it does. Networks for faces and for inpainting are refused.',
    ),
)


def rows() -> dict[str, tuple[int, Callable[[], dict[str, torch.Tensor]]]]:
    """The name of each row -> its group, and what makes the state dict of its network."""

    def of_section(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return dict(build_network({'type': name, **SECTIONS[name]}).state_dict())

    known: dict[str, tuple[int, Callable[[], dict[str, torch.Tensor]]]] = {
        name: (0 if name in OURS else 1, lambda name=name: of_section(name)) for name in FAMILIES
    }
    of_spandrel = {name: (2, small.state) for name, small in SMALL.items() if small.family is None}
    return {**known, **{f'{name}, as spandrel' if name in known else name: one for name, one in of_spandrel.items()}}


def row(name: str) -> str:
    """A line of the table: every cell is tried."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cells = _try(rows()[name][1](), Path(folder))
    return f'| {name} | {" | ".join(cells[column] for column in COLUMNS)} |'


def _try(state: dict[str, torch.Tensor], folder: Path) -> dict[str, str]:
    file, trained, merged = (folder / f'{name}.pth' for name in ('base', 'trained', 'merged'))
    torch.save({'params': state}, file)
    network = load_network(file)
    loaded = in_layout(network.state_dict(), layout_of(network))
    has_all = loaded.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in loaded.items())
    cells = {'loads': 'yes' if has_all else 'no'}
    info = network_info(network)
    assert info is not None
    cells['upscales'] = _tried(lambda: Upscaler(network)(np.zeros((19, 27, info.in_channels), np.uint8)))
    cells['kernels'] = 'yes' if lora_sr.optimize(network).engine == 'kernels' else 'no'
    for column, export, suffix in (
        ('ONNX', export_onnx, '.onnx'),
        ('TorchScript', export_torchscript, '.pt'),
        ('chaiNNer', export_chainner, '.pth'),
    ):
        cells[column] = _tried(lambda export=export, suffix=suffix: export(file, folder / f'exported{suffix}'))

    if not any(map(is_lora_key, state)):
        add_lora(network, LoRAConfig(groups=['all'], rank=2))
    mark_trainable(network)
    values = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(values, lr=1e-3)
    before = [value.detach().clone() for value in values]
    for _ in range(2):
        image = torch.rand(2, info.in_channels, *info.size(16, 16))
        optimizer.zero_grad()
        (network.train()(image) / info.value_range - 0.5).abs().mean().backward()
        optimizer.step()
    cells['is adapted'] = 'yes' if any(not torch.equal(*pair) for pair in zip(before, values)) else 'no'
    layout = layout_of(network)
    torch.save({'params': network.eval().state_dict(), 'lora_sr': Origin(layout=layout).to_dict()}, trained)
    merge_checkpoint(trained, merged)
    written = torch.load(merged, weights_only=True)['params']
    plain = {key: value.shape for key, value in without_lora(state).items()}
    is_same = {key: value.shape for key, value in written.items()} == plain
    cells['merges back'] = 'yes' if is_same else 'folded' if len(written) < len(plain) else 'no'
    return cells


def _tried(do: Callable[[], object]) -> str:
    try:
        do()
    except InputError as error:
        return next((cell for part, cell in LIMITS.items() if part in str(error)), 'no')
    return 'yes'


def document(line: Callable[[str], str] = row) -> str:
    """The text of ``docs/families.md``, with a line of the table for each row."""
    parts = [INTRODUCTION]
    for index, (title, text) in enumerate(GROUPS):
        head = [f'| | {" | ".join(COLUMNS)} |', f'| {" | ".join("---" for _ in range(len(COLUMNS) + 1))} |']
        lines = [line(name) for name, (group, _) in rows().items() if group == index]
        parts.append('\n'.join([f'## {title}\n', *([f'{text}\n'] if text else []), *head, *lines]))
    return '\n\n'.join(part.strip() for part in parts) + '\n'


if __name__ == '__main__':
    DOCUMENT.write_text(document(), encoding='utf-8')
