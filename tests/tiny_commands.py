"""Small inputs of all commands, in one folder."""

from pathlib import Path

import torch
from basicsr.archs.srresnet_arch import MSRResNet
from tiny_run import TINY_OPTIONS, write_pairs

from lora_sr.adapters import LoRAConfig, add_lora, lora_layers, save_adapter
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.span import SPAN

LOG = """\
  total_iter: 4
2024-01-01 00:00:00,000 INFO: [tiny..][epoch:  0, iter:       4, lr:(1.000e-03,)] l_pix: 1.0e-01
2024-01-01 00:00:00,000 INFO: Validation val
\t # psnr: 30.0000\tBest: 30.0000 @ 4 iter
"""


def write_inputs(folder: Path) -> None:
    """Write `images` and `lq` (three pairs, x2), the checkpoints `base.pth` (SPAN), `lora.pth` (DSCLoRA) and
    `resnet.pth`, the adapter `a.safetensors` of `base.pth`, the option file `adapt.yml` and the run `run`.
    """
    write_pairs(folder, count=3)
    (folder / 'gt').rename(folder / 'images')
    torch.manual_seed(0)
    small = {'feature_channels': 6, 'upscale': 2}
    torch.save({'params': SPAN(deploy=True, **small).state_dict()}, folder / 'base.pth')
    torch.save({'params': DSCLoRA(rank=2, **small).state_dict()}, folder / 'lora.pth')
    network = SPAN(deploy=True, **small)
    network.load_state_dict(torch.load(folder / 'base.pth')['params'])
    add_lora(network, LoRAConfig([r'block_\d\..*'], rank=1))
    for _, layer in lora_layers(network):
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(network, folder / 'a.safetensors')
    (folder / 'run').mkdir()
    (folder / 'run/train_tiny_20240101_000000.log').write_text(LOG)
    text = TINY_OPTIONS.format(root=folder, suffix='', backend='disk').replace(f'{folder}/gt', f'{folder}/images')
    head, tail = text.split('network_g:\n')
    network_g = 'network_g:\n  type: AdaptSR\n  base:\n'
    network_g += '    type: MSRResNet\n    num_feat: 4\n    num_block: 1\n    upscale: 2\n'
    network_g += '  lora: {groups: [all], rank: 2}\npath:\n'
    torch.save({'params': MSRResNet(num_feat=4, num_block=1, upscale=2).state_dict()}, folder / 'resnet.pth')
    tail = tail.replace('pretrain_network_g: ~', f'pretrain_network_g: {folder}/resnet.pth')
    (folder / 'adapt.yml').write_text(head + network_g + tail.split('path:\n')[1])
