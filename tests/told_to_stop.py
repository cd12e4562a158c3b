"""One of two processes of a run, of which the second is told to stop: prints what it knows of it, or when it stops.

Arguments: its rank, the port of the first, and whether that happens `before` the training or in its fifth iteration.
"""

import os
import signal
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from lora_sr.basicsr import signals

rank, port = map(int, sys.argv[1:3])
saved = []
model = SimpleNamespace(opt={'rank': rank}, save=lambda epoch, iteration: saved.append(iteration))
dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
signals.listen()
if sys.argv[3] == 'before':
    known = [signals.told_anywhere()]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    print(rank, *known, signals.told_anywhere())
    sys.exit()
for iteration in range(1, 21):
    dist.all_reduce(torch.zeros(1))  # of gradients
    if rank == 1 and iteration == 5:
        os.kill(os.getpid(), signal.SIGUSR1)
    try:
        signals.stop_if_told(model, 0, iteration, 0)
    except SystemExit as ended:
        print(rank, iteration, saved)
        sys.exit(ended.code)
