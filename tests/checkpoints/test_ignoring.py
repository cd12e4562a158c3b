"""What trainers keep beside weights is left unread, and nothing of it is run."""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from wrapped import assert_equal, plain

from lora_sr.archs import SPAN
from lora_sr.checkpoints import load_network
from lora_sr.errors import InputError


class Dictionary(dict):
    """As a trainer's options are one."""


class Marked(dict):
    """A dictionary with attributes, as EasyDict and yacs make them."""

    def __init__(self):
        super().__init__(lr=1e-3)
        self.frozen = True


class Note:
    """A value of a class of the trainer's own."""

    def __init__(self):
        self.text = 'mine'


@pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'), reason='torch < 2.6 refuses all of them'
)
@pytest.mark.parametrize('is_archive', [True, False])
@pytest.mark.parametrize(
    'beside',
    [
        argparse.Namespace(lr=1e-3),
        np.float64(31.2),
        np.arange(3),
        Path('data'),
        defaultdict(list, {'psnr': [1.0]}),
        Dictionary(lr=1e-3),
        Marked(),
        Note(),
        [Note(), argparse.Namespace(), {'best': np.float32(3)}, Dictionary(a=Dictionary())],
    ],
)
def test_what_else_a_trainer_kept_is_not_read(tmp_path, beside, is_archive):
    content = {'state_dict': plain(), 'hyper_parameters': beside}
    torch.save(content, tmp_path / 'net.pth', _use_new_zipfile_serialization=is_archive)
    assert_equal(load_network(tmp_path / 'net.pth').state_dict())


class Runs:
    """Makes a file when it is unpickled, through whatever of Python's own."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('is_archive', [True, False])
@pytest.mark.parametrize('function', [os.system, os.mkdir, exec, eval, subprocess.call, shutil.copy, runpy.run_path])
def test_nothing_that_it_names_is_run(tmp_path, function, is_archive):
    argument = f"open({str(tmp_path / 'ran')!r}, 'w')" if function in (exec, eval) else f'touch {tmp_path}/ran'
    content = {'state_dict': plain(), 'hyper_parameters': Runs(function, argument)}
    torch.save(content, tmp_path / 'net.pth', _use_new_zipfile_serialization=is_archive)
    before_loading = set(os.listdir())
    try:
        assert_equal(load_network(tmp_path / 'net.pth').state_dict())
    except InputError as error:
        assert 'holds more than tensors and plain values' in str(error)
    assert not (tmp_path / 'ran').exists() and set(os.listdir()) == before_loading


def test_a_pickled_network_is_told(tmp_path):
    torch.save(SPAN(feature_channels=4, deploy=True), tmp_path / 'net.pth')
    with pytest.raises(InputError, match=r'a pickled lora_sr\.archs\.span\.SPAN, which is not run: its state dict has'):
        load_network(tmp_path / 'net.pth')
