"""What it costs to start: CPU seconds of imports and commands in fresh processes, each beside its budget."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_sr.checkpoints import Checkpoint
from lora_sr.errors import InputError

REPEATS = 5


@dataclass(frozen=True)
class Subject:
    """What is started.

    Args:
        name: As the table shows it.
        arguments: Of the interpreter.
        budget: CPU seconds at most, beyond those of ``base``; None for what is measured to compare with.
        base: The name of another subject.
    """

    name: str
    arguments: tuple[str, ...]
    budget: float | None = None
    base: str | None = None


COMMAND = ('-m', 'lora_sr.cli.main')
SUBJECTS = (
    Subject('python', ('-c', 'pass')),
    Subject('import lora_sr', ('-c', 'import lora_sr'), 0.05, 'python'),
    Subject('lora-sr --help', (*COMMAND, '--help'), 0.3),
    Subject('import torch', ('-c', 'import torch')),
    Subject('import lora_sr.adapters', ('-c', 'import lora_sr.adapters'), 0.2, 'import torch'),
)
INSPECT_BUDGET = 0.7


def run(checkpoint: Path | None = None, repeats: int = REPEATS) -> None:
    """Print the CPU seconds of each subject beside its budget, and which are over it.

    Args:
        checkpoint: A file for ``lora-sr inspect``, whose budget is that of spantiny_ch26_x4.pth.
        repeats: How many processes are measured for each.

    Raises:
        InputError: A process fails.
    """
    subjects = list(SUBJECTS)
    if checkpoint is not None:
        Checkpoint.read(checkpoint)  # what cannot be read is told before others are measured
        inspect = (*COMMAND, 'inspect', str(checkpoint))
        subjects.append(Subject(f'lora-sr inspect {checkpoint.name}', inspect, INSPECT_BUDGET, 'import torch'))
    seconds = measure(subjects, repeats)
    width = max(len(subject.name) for subject in subjects) + 2
    print(f'CPU seconds, user and system, of {repeats} processes each, after one that is not counted')
    print(f'{"":{width}}{"least":>8}{"median":>8}{"budget":>8}')
    over = []
    for subject in subjects:
        least, budget = min(seconds[subject.name]), budget_of(subject, seconds)
        row = f'{subject.name:{width}}{least:8.3f}{statistics.median(seconds[subject.name]):8.3f}'
        if budget is not None:
            row += f'{budget:8.3f}'
            row += f'  {subject.base} + {subject.budget}' if subject.base else ''
            if least > budget:
                over.append(subject.name)
        print(row)
    print(f'over budget: {", ".join(over) or "none"}')


def budget_of(subject: Subject, seconds: dict[str, list[float]]) -> float | None:
    """The CPU seconds that a subject may take, as measured on this machine; None where it has no budget."""
    if subject.budget is None:
        return None
    # The least of each: what else runs on the machine only adds.
    return subject.budget + (min(seconds[subject.base]) if subject.base else 0)


def measure(subjects: Sequence[Subject], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of fresh processes, which take turns, by the subject's name; the first of each is not counted.

    Raises:
        InputError: A process fails.
    """
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for round_ in range(repeats + 1):
        for subject in subjects:
            used = cpu_seconds(subject)
            if round_:
                seconds[subject.name].append(used)
    return seconds


def cpu_seconds(subject: Subject) -> float:
    """CPU seconds, user and system, of one process and its children.

    Raises:
        InputError: It fails.
    """
    import resource  # not on Windows, where the other benchmarks run

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *subject.arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]
        raise InputError(f'"{subject.name}" cannot be measured: {reason}')
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
