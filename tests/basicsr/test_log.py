"""What this package logs in a run."""

import logging

import pytest
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lora_sr.adapters import LoRAConfig, add_lora
from lora_sr.basicsr import log


@pytest.fixture
def lines():
    """What BasicSR's log shows, as `get_root_logger` sets it up."""
    logger, found = logging.getLogger('basicsr'), []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(before)


def network():
    return nn.ModuleDict({'plain': nn.Linear(3, 4), 'computed': weight_norm(nn.Linear(4, 5))})


def test_what_is_left_alone_is_said_once_in_each_run(lines):
    log.join_logs()  # once more: it changes nothing
    for number in (1, 2):
        log.start_log()
        for _ in range(3):  # for the check, for the run, for the average
            add_lora(network(), LoRAConfig(['plain'], rank=1))
        assert len(lines) == number and 'computed' in lines[-1] and 'plain' not in lines[-1]
