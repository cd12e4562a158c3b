"""Options of two iterations of a tiny GAN, or of Real-ESRGAN's degradations without one, over a generator with LoRA."""

import re
from pathlib import Path

import torch
from basicsr.archs.srresnet_arch import MSRResNet
from tiny_run import write_pairs

DEGRADATIONS = """\
gt_usm: true
l1_gt_usm: true
percep_gt_usm: true
gan_gt_usm: false
resize_prob: [0.2, 0.7, 0.1]
resize_range: [0.15, 1.5]
gaussian_noise_prob: 0.5
noise_range: [1, 30]
poisson_scale_range: [0.05, 3]
gray_noise_prob: 0.4
jpeg_range: [30, 95]
second_blur_prob: 0.8
resize_prob2: [0.3, 0.4, 0.3]
resize_range2: [0.3, 1.2]
gaussian_noise_prob2: 0.5
noise_range2: [1, 25]
poisson_scale_range2: [0.05, 2.5]
gray_noise_prob2: 0.4
jpeg_range2: [30, 95]
gt_size: 32
queue_size: 2
"""

RUN = """\
name: tiny
model_type: {model}
scale: 4
num_gpu: 0
manual_seed: 0
{degradations}
datasets:
  train: {dataset}
  val:
    name: val
    type: PairedImageDataset
    dataroot_gt: {data}/gt
    dataroot_lq: {data}/lq
    io_backend: {{type: disk}}
network_g:
  type: AdaptSR
  base: {{type: MSRResNet, num_feat: 4, num_block: 1, upscale: 4}}
  lora: {{groups: [all], rank: 2}}
network_d: {{type: UNetDiscriminatorSN, num_in_ch: 3, num_feat: 4}}
path: {{pretrain_network_g: {data}/base.pth}}
train:
  ema_decay: 0.9
  optim_g: {{type: AdamW, lr: 1e-2, weight_decay: 0.1}}
  optim_d: {{type: Adan, lr: 1e-2}}
  scheduler: {{type: MultiStepLR, milestones: [100]}}
  total_iter: 2
  pixel_opt: {{type: L1Loss}}
  gan_opt: {{type: GANLoss, gan_type: vanilla, loss_weight: 0.1}}
val:
  val_freq: 1
  save_img: false
  metrics:
    psnr: {{type: calculate_psnr, crop_border: 4}}
logger: {{print_freq: 1, save_checkpoint_freq: 1, use_tb_logger: false}}
"""

PAIRED = """{{name: train, type: PairedImageDataset, dataroot_gt: {data}/gt, dataroot_lq: {data}/lq,
    io_backend: {{type: disk}}, gt_size: 32, use_hflip: true, use_rot: true, batch_size_per_gpu: 2,
    num_worker_per_gpu: 0, dataset_enlarge_ratio: 10}}"""
DEGRADED = """{{name: train, type: RealESRGANDataset, dataroot_gt: {data}/gt, meta_info: {data}/names.txt,
    io_backend: {{type: disk}}, use_hflip: true, use_rot: true, batch_size_per_gpu: 1, num_worker_per_gpu: 1,
    dataset_enlarge_ratio: 10, blur_kernel_size: 21, kernel_list: [iso, aniso], kernel_prob: [0.5, 0.5],
    sinc_prob: 0.1, blur_sigma: [0.2, 3], betag_range: [0.5, 4], betap_range: [1, 2], blur_kernel_size2: 21,
    kernel_list2: [iso, aniso], kernel_prob2: [0.5, 0.5], sinc_prob2: 0.1, blur_sigma2: [0.2, 1.5],
    betag_range2: [0.5, 4], betap_range2: [1, 2], final_sinc_prob: 0.8}}"""


def write_data(root: Path) -> None:
    """Write what a run reads to `root`.

    These are eight 4x pairs, GT of 128x128 pixels, as `write_pairs` writes them, `names.txt`, the list of GT names, and
    `base.pth`, the generator's base.
    """
    write_pairs(root, gt_size=128, scale=4)
    torch.save({'params': MSRResNet(num_feat=4, num_block=1, upscale=4).state_dict()}, root / 'base.pth')
    (root / 'names.txt').write_text(''.join(f'{index:03}.png ({index})\n' for index in range(8)))


def tiny_gan_options(model: str, data) -> str:
    """The text of an option file for a model of BasicSR, on what `write_data` has written.

    Real-ESRGAN's models make their LR images themselves; the others get pairs.
    """
    degrades = model.startswith('Real')
    dataset = (DEGRADED if degrades else PAIRED).format(data=data)
    text = RUN.format(model=model, data=data, dataset=dataset, degradations=DEGRADATIONS if degrades else '')
    return text if 'GAN' in model else re.sub(r'(network_d|  optim_d|  gan_opt): .*\n', '', text)
