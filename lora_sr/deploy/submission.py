"""What a team hands in to a NTIRE efficient SR challenge: one file of code, the weights, and what goes with them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import nn

from lora_sr.adapters import count_parameters
from lora_sr.archs import LKDN, SPAN, NetworkInfo, network_info
from lora_sr.archs.complexity import CHALLENGE_SIDE, count_activations, count_convolutions, count_flops
from lora_sr.archs.info import refusal
from lora_sr.archs.registry import is_ours
from lora_sr.archs.reparam import deploy_form, relative_difference
from lora_sr.checkpoints import NetworkLike, OpenedNetwork, open_network
from lora_sr.checkpoints.networks import input_files
from lora_sr.deploy.own_source import write_own_source
from lora_sr.deploy.submitted_networks import class_name_for, describe, submitted_state, write_source
from lora_sr.errors import InputError
from lora_sr.files import (
    check_not_input,
    check_replaceable,
    is_same_file,
    partial_folder,
    remove_abandoned,
    was_interrupted,
)

CHALLENGE_SCALE = 4
TOLERANCE = 1e-6  # of the largest output, where outputs are not equal to the bit
LARGEST_TEAM = 999
STAGING = 'submission'  # within the name of the hidden folder in which the files are made
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+-]{0,39}')
# Batch, channels, height and width of the images on which the file is run.
VERIFIED_SHAPES = ((1, 3, 17, 23), (1, 3, 41, 29), (2, 3, 31, 37))

# Run in a process of its own, from the folder that holds models/ and model_zoo/, as the organizers' program does.
_VERIFICATION = """
import os, sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('lora_sr', 'basicsr'):
            raise ImportError(f'it imports {name}')

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, os.getcwd())
torch.set_num_threads(THREADS)

def select_model(model_id):
    if model_id is None:
        pass
BRANCH
    return model

model = select_model(TEAM).eval()
loaded = [name for name in sys.modules if name.split('.')[0] in ('lora_sr', 'basicsr')]
assert not loaded, f'it has loaded {loaded[0]}'
with torch.no_grad():
    torch.save([model(image) for image in torch.load(IMAGES)], OUTPUTS)
"""

_FACTSHEET = """\
# Team {number}: {name}

{description}, in deploy form: merged and folded.

| | |
| --- | --- |
| Scale | x{scale}{scale_note} |
| Parameters | {parameters:,} ({parameters_m:.3f} M) |
| FLOPs, as multiply-adds, input 256x256 | {flops:.2f} G |
| Activations, input 256x256 | {activations:.2f} M |
| Convolutions | {convolutions} |
| Input and output | RGB in [0, {data_range:g}] (`data_range` {data_range}), any size |

Counted as the challenge does: by fvcore's `FlopCountAnalysis`, and by the organizers' `get_model_activation`.

| file | |
| --- | --- |
| `{code}` | the network, `{class_name}()`; imports torch alone |
| `{weights}` | {size:,} bytes, SHA-256 `{sha256}` |
| `{branch}` | the branch for `select_model` in `test_demo.py` |

Verified with torch {torch}, in a process that could import neither lora_sr nor basicsr: `{code}` loads these weights
strictly, and its images are those of the network that it was made from {equality}, on random inputs of {shapes}.

## For the team to fill in

- Members, affiliations, contact:
- Idea of the method, and what is new in it:
- Training data:
- Training: stages, losses, optimizer, learning rates, iterations, patch and batch sizes, hardware, time:
- PSNR on DIV2K_LSDIR_valid and DIV2K_LSDIR_test:
- Runtime and memory, and the GPU on which they were measured:
- Command to download this code:
"""


@dataclass(frozen=True)
class SubmissionReport:
    """What :func:`write_submission` wrote, and what it measured.

    Args:
        description: The network and its size in words.
        scale: Its scale factor.
        parameters: Its number of parameters.
        flops: Multiply-adds for an input of 256x256, as the challenge counts them.
        activations: Values that its convolutions give for an input of 256x256.
        convolutions: How many of them run.
        sha256: Of the file of weights.
        difference: Of the file's outputs from ours, relative to the largest; 0 where they are equal to the bit.
        branch: What to paste into the organizers' ``select_model``.
        files: What was written, relative to the folder.
    """

    description: str
    scale: int
    parameters: int
    flops: int
    activations: int
    convolutions: int
    sha256: str
    difference: float
    branch: str
    files: tuple[str, ...]

    @property
    def equality(self) -> str:
        """How equal the images of the written file are to ours, in words."""
        return f'within {self.difference:.1e} of the largest value' if self.difference else 'to the bit'

    def __str__(self) -> str:
        note = '' if self.scale == CHALLENGE_SCALE else f' (the challenge is x{CHALLENGE_SCALE})'
        return (
            f'network               {self.description}, x{self.scale}{note}\n'
            f'parameters            {self.parameters:,} ({self.parameters / 1e6:.3f} M)\n'
            f'multiply-adds         {self.flops / 1e9:.2f} G ({CHALLENGE_SIDE}x{CHALLENGE_SIDE} input)\n'
            f'activations           {self.activations / 1e6:.2f} M\n'
            f'convolutions          {self.convolutions}\n'
            f'SHA-256 of weights    {self.sha256}\n'
            f'images of the file    those of the checkpoint {self.equality} (in a process without lora_sr)'
        )


def write_submission(
    source: NetworkLike,
    output: str | os.PathLike[str],
    team: int,
    name: str,
    param_key: str | None = None,
    overwrite: bool = False,
) -> SubmissionReport:
    """Write what a team hands in to the NTIRE efficient SR challenge, and prove it before it appears.

    Into the folder go ``models/teamNN_NAME.py``, which imports torch alone; ``model_zoo/teamNN_NAME.pth``, its weights,
    a plain state dict; ``teamNN_NAME_select_model.txt``, the branch to paste into the organizers' ``test_demo.py``; and
    ``teamNN_NAME_factsheet.md``. The branch is run in a process that can import neither this package nor BasicSR, and
    its network's images of odd sizes are compared with those of the checkpoint.

    Args:
        source: Whatever :func:`lora_sr.load_network` takes, with LoRA and branches or without: SPAN, DSCLoRA, LKDN and
            LKDN-S are written out as they run; of other networks the module of their class is taken, which has to stand
            alone: it may import torch and Python's own modules, and BasicSR's registry, which is left out.
        output: A folder. One that is there, such as a clone of the organizers' repository, gets the files beside its
            own; one that is not appears whole or not at all.
        team: Number of the team, 1 to 999.
        name: Of the entry, up to 40 letters, digits, and ``.``, ``_``, ``+``, ``-``. In names of files and of the class
            what Python does not allow becomes ``_``.
        param_key: Where the state dict is in a file; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.
        overwrite: Replace files of these names that are there.

    Raises:
        InputError: ``team`` or ``name`` is not as above; the checkpoint cannot be used, or is of another family of this
            package; a file of these names exists, or cannot be written; or the written network's images differ from the
            checkpoint's by more than 1e-6 of the largest. The folder is as it was then.
    """
    output = Path(output)
    _check_team_and_name(team, name)
    opened = open_network(source, param_key)
    try:
        network = deploy_form(opened.network)
    except InputError as error:
        raise InputError(f'{opened.name} cannot be folded: {error}') from None
    info = network_info(network)
    if info is None or info.fixed_size is not None or (info.in_channels, info.out_channels) != (3, 3):
        reason = refusal(network) if info is None else ''
        raise InputError(f'{opened.name} does not take RGB images of any size, as a submission has to{reason}.')

    class_name = class_name_for(_write(opened, network, info, '', '_'), name)
    stem = f'team{team:02}_{re.sub(r"[^A-Za-z0-9_]", "_", name)}'
    code, weights = f'models/{stem}.py', f'model_zoo/{stem}.pth'
    branch_file, factsheet = f'{stem}_select_model.txt', f'{stem}_factsheet.md'
    files = (code, weights, branch_file, factsheet)
    # Beside an output that was new, and within one that was there.
    interrupted = was_interrupted([output.parent / STAGING, output / STAGING])
    _check_folder(output, files, overwrite or interrupted)
    for file in files:
        check_not_input(output / file, input_files(source, opened.checkpoint))
    branch = _branch(team, name, stem, class_name, float(info.value_range))
    with _staging(output) as staging:
        for folder in ('models', 'model_zoo'):
            (staging / folder).mkdir()
        text = _write(opened, network, info, f'Team {team:02}, {name}', class_name)
        (staging / code).write_text(text, encoding='utf-8')
        _save(submitted_state(network), staging / weights)
        (staging / branch_file).write_text(branch, encoding='utf-8')
        report = SubmissionReport(
            description=describe(network),
            scale=info.scale,
            parameters=count_parameters(network).total,
            flops=count_flops(network),
            activations=count_activations(network),
            convolutions=count_convolutions(network),
            sha256=hashlib.sha256((staging / weights).read_bytes()).hexdigest(),
            difference=_verify(network, staging, branch, team, opened.name),
            branch=branch,
            files=files,
        )
        text = _FACTSHEET.format(
            number=f'{team:02}',
            name=name,
            description=f'{report.description}{_paper(network)}',
            scale=report.scale,
            scale_note='' if report.scale == CHALLENGE_SCALE else f': the challenge is x{CHALLENGE_SCALE}',
            data_range=float(info.value_range),
            parameters=report.parameters,
            parameters_m=report.parameters / 1e6,
            flops=report.flops / 1e9,
            activations=report.activations / 1e6,
            convolutions=report.convolutions,
            code=code,
            class_name=class_name,
            weights=weights,
            size=(staging / weights).stat().st_size,
            sha256=report.sha256,
            branch=branch_file,
            equality=report.equality,
            shapes=', '.join('x'.join(map(str, shape)) for shape in VERIFIED_SHAPES),
            torch=torch.__version__,
        )
        (staging / factsheet).write_text(text, encoding='utf-8')
        _put_in_place(staging, output, files, overwrite)
    return report


def _check_team_and_name(team: int, name: str) -> None:
    if not 1 <= team <= LARGEST_TEAM:
        raise InputError(f'The team number {team} should be between 1 and {LARGEST_TEAM} (0 is the baseline).')
    if not NAME.fullmatch(name):
        raise InputError(
            f'The name {name!r} should be up to 40 letters, digits, ".", "_", "+" and "-", beginning with a letter or '
            'a digit.'
        )


def _write(opened: OpenedNetwork, network: nn.Module, info: NetworkInfo, title: str, class_name: str) -> str:
    """The source of the network's file."""
    if isinstance(network, (SPAN, LKDN)):
        return write_source(network, title, class_name)
    if is_ours(network):
        raise InputError(
            f'{opened.name} cannot be submitted: its network must be SPAN, LKDN or one of your own, got '
            f'{type(network).__name__}.'
        )
    if opened.arguments is None:
        raise InputError(
            f'{opened.name} cannot be submitted: with which arguments {type(network).__name__} was built is not known; '
            'name its option file with -opt.'
        )
    return write_own_source(network, opened.arguments, info, title, class_name)


def _paper(network: nn.Module) -> str:
    if isinstance(network, SPAN):
        return ' (arXiv:2311.12770)'
    return ' (LKDN, CVPR Workshops 2023)' if isinstance(network, LKDN) else ''


def _branch(team: int, name: str, stem: str, class_name: str, data_range: float) -> str:
    return (
        f'    elif model_id == {team}:\n'
        f'        from models.{stem} import {class_name}\n'
        f'        name, data_range = f"{{model_id:02}}_{name}", {data_range}\n'
        f"        model_path = os.path.join('model_zoo', '{stem}.pth')\n"
        f'        model = {class_name}()\n'
        '        model.load_state_dict(torch.load(model_path), strict=True)\n'
    )


def _check_folder(output: Path, files: tuple[str, ...], overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f'The output {output} is a file, and should be a folder.')
    if not output.exists() and not output.parent.is_dir():
        raise InputError(f'The folder {output.parent} of the output does not exist.')
    for file in files:
        check_replaceable(output / file)
        if os.path.lexists(output / file) and not overwrite:
            raise InputError(
                f'The output {output / file} exists: choose another folder, name or team, or allow it with --overwrite.'
            )


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder on the disk of ``output`` that is gone afterwards, whatever happens."""
    try:
        remove_abandoned(output.parent, STAGING)
        with partial_folder(output if output.is_dir() else output.parent, STAGING) as hidden:
            staging = hidden / 'submission'
            staging.mkdir()  # with the usual permissions; those of a partial folder are for its owner alone
            yield staging
    except OSError as error:
        raise InputError(f'The output {output} cannot be written: {error.strerror}.') from error


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch's own writer raises on a full disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


@torch.no_grad()
def _verify(network: nn.Module, folder: Path, branch: str, team: int, name: str) -> float:
    """Run what was written by itself, and return how far its images are from the network's; see ``difference``."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(shape, generator=generator) for shape in VERIFIED_SHAPES]
    with tempfile.TemporaryDirectory() as exchange:
        inputs, outputs = (os.path.join(exchange, name) for name in ('images.pt', 'outputs.pt'))
        torch.save(images, inputs)
        values = {
            'THREADS': str(torch.get_num_threads()),
            'BRANCH': branch,
            'TEAM': str(team),
            'IMAGES': repr(inputs),
            'OUTPUTS': repr(outputs),
        }
        program = re.sub('|'.join(values), lambda match: values[match[0]], _VERIFICATION)
        # Isolated: neither the user's packages nor the environment's paths; and no cached bytecode beside the file.
        process = subprocess.run(
            [sys.executable, '-I', '-B', '-c', program], cwd=folder, capture_output=True, text=True, errors='replace'
        )
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or [f'status {process.returncode}'])[-1].strip()
            raise InputError(f'The submission was not written, as its file does not run by itself: {reason}')
        written = torch.load(outputs, weights_only=True)
    differences = [relative_difference(network(image), output) for image, output in zip(images, written)]
    for difference in differences:
        if not difference <= TOLERANCE:
            raise InputError(
                f'The submission was not written, as its images differ by {difference:.1e} of the largest output from '
                f'those of {name}, more than {TOLERANCE:.0e}: its weights are too large for float32, or NaN.'
            )
    return max(differences)


def _put_in_place(staging: Path, output: Path, files: tuple[str, ...], overwrite: bool) -> None:
    """Move the staged files to the output: a new folder in one step, into one that is there all of them or none."""
    if not output.exists():
        os.rename(staging, output)
        return
    changed = tuple(file for file in files if not is_same_file(staging / file, output / file))
    _check_folder(output, changed, overwrite)
    undo: list[Callable[[], object]] = []
    try:
        for file in changed:
            target, former = output / file, staging / f'{file}.former'
            if not target.parent.exists():
                target.parent.mkdir()
                undo.append(target.parent.rmdir)
            is_new = not target.exists()
            if not is_new:
                shutil.copy2(target, former)  # moved away, it would be lost if the process were killed now
            os.replace(staging / file, target)
            undo.append(target.unlink if is_new else partial(os.replace, former, target))
    except BaseException:
        for step in reversed(undo):
            step()
        raise
