"""The check of an option file before a run starts: everything that is wrong, at once, one sentence each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lora_sr.basicsr.options.check import Check, for_screen
from lora_sr.basicsr.options.datasets import check_datasets
from lora_sr.basicsr.options.fit import check_fit
from lora_sr.basicsr.options.general import check_logger, check_top, check_val
from lora_sr.basicsr.options.networks import check_networks
from lora_sr.basicsr.options.paths import check_output, check_path
from lora_sr.basicsr.options.training import check_train


def check_options(
    opt: dict, is_train: bool, root_path: str | os.PathLike | None = None, processes: int = 1
) -> list[str]:
    """What is wrong with the options of a run, as sentences; an empty list if nothing is.

    Args:
        opt: the options as the file and `--force_yml` give them; they are not changed.
        is_train: whether they are for training rather than for a test.
        root_path: the folder that will hold `experiments/` or `results/`; by default the current one.
        processes: how many processes the run has, on all its machines.
    """
    odd = list(_keys_that_are_no_texts(opt))
    if odd:  # which everything else here counts on
        return for_screen([f'the keys of {where or "the file"} must be texts, got {key!r}' for where, key in odd])
    check = Check(opt, is_train, Path(root_path or os.getcwd()), processes)
    check_top(check)
    check_networks(check)
    check_path(check)
    if is_train:
        check_train(check)
        check_logger(check)
    check_val(check)
    check_datasets(check)
    check_fit(check)
    check_output(check)
    return for_screen(check.problems)


def _keys_that_are_no_texts(section: dict, where: str = '') -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if not isinstance(key, str):
            yield where, key
        elif isinstance(value, dict) and not key.startswith('x-'):
            yield from _keys_that_are_no_texts(value, f'{where}.{key}' if where else key)
