"""What is where in the folder that ``lora-sr adapt`` writes: its writers and its readers have the names from here."""

from __future__ import annotations

RECORD = 'adapt.json'  # all numbers
OPTIONS, BASE, ADAPTER, MERGED = 'train.yml', 'base.pth', 'adapter.safetensors', 'merged.pth'
REPORT = 'report.html'
DATA = 'data'
HELD = 'held'  # the set of what is held back, and its folder below that of the data
HR, LR = 'HR', 'LR'  # below that one
NAME = 'adapt'  # of the run
RUN = f'experiments/{NAME}'
BEST = f'{RUN}/models/net_g_best_{HELD}.pth'
