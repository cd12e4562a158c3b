"""What the checks of all sections share: the options, the sentences, and the tools to find them."""

import difflib
import inspect
import os
from pathlib import Path

# Keys that BasicSR's own code reads. It ignores all others, and so does this check, unless one is almost one of these.
KNOWN = {
    '': 'name model_type scale num_gpu manual_seed datasets network_g network_d network_t path train val logger '
    'dist_params find_unused_parameters',
    'path': 'pretrain_network_g pretrain_network_d pretrain_network_t strict_load_g strict_load_d strict_load_t '
    'param_key_g param_key_d param_key_t resume_state ignore_resume_networks experiments_root results_root',
    'train': 'total_iter warmup_iter ema_decay optim_g optim_d scheduler pixel_opt perceptual_opt gan_opt',
    'val': 'val_freq save_img suffix metrics pbar',
    'logger': 'print_freq save_checkpoint_freq use_tb_logger wandb',
    'dataset': 'name type dataroot_gt dataroot_lq meta_info_file io_backend filename_tmpl gt_size lq_size use_hflip '
    'use_rot batch_size_per_gpu num_worker_per_gpu dataset_enlarge_ratio prefetch_mode num_prefetch_queue pin_memory '
    'persistent_workers mean std color',
}


class Check:
    """The check of one option file: its options, what has been found wrong with them, and the tools to find it.

    Args: see :func:`lora_sr.basicsr.options.check_options`.
    """

    def __init__(self, opt: dict, is_train: bool, root: Path, processes: int):
        self.opt, self.is_train, self.root, self.processes = opt, is_train, root, processes
        self.problems = []
        self.networks = {}
        self.ours = opt.get('model_type') == 'DistillationModel'

    def add(self, sentence) -> None:
        """Keep a sentence about what is wrong."""
        self.problems.append(str(sentence))

    def is_section(self, where: str, given) -> bool:
        """Check that something is a section of keys."""
        if not isinstance(given, dict):
            self.add(f'{where} has to be a section of keys, not {given!r}')
        return isinstance(given, dict)

    def section(self, where: str, given, known: str, required: str = '', only_known: bool = False) -> bool:
        """Check the keys of a section. Returns whether it is a section that has all it needs."""
        if not self.is_section(where, given):
            return False
        prefix = f'{where}.' if where else ''
        complete = True
        absent = [key for key in known.split() if key not in given]
        for key in [key for key in given if key not in known.split()]:
            near = difflib.get_close_matches(str(key), absent, n=1, cutoff=0.6 if only_known else 0.85)
            if near:
                absent.remove(near[0])
                complete = complete and near[0] not in required.split()
                self.add(f"{prefix}{key} is not a known key; did you mean '{near[0]}'?")
            elif only_known:
                complete = False
                self.add(f'{prefix}{key} is not a known key; the keys here are {", ".join(known.split())}')
        for key in required.split():
            if key in absent or (key not in known.split() and key not in given):
                complete = False
                self.add(f'{prefix}{key} is missing')
        return complete

    def number(self, where: str, value, least=0, whole=True) -> bool:
        """Check that a value is a number, and at least `least`."""
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= least
        if not good or (whole and value != int(value)):
            self.add(f'{where} has to be a {"whole " if whole else ""}number of at least {least}, not {value!r}')
            return False
        return True

    def registered(self, where: str, name, registry, what: str):
        """The class or function of that name in a registry or dictionary, or None."""
        known = registry if isinstance(registry, dict) else dict(iter(registry))  # its keys() lacks a [] to go with it
        if name is None:
            self.add(f'{where} is missing')
        elif not isinstance(name, str):
            self.add(f'{where} has to be a name, not {name!r}')
            return None
        elif f'{name}_basicsr' in known:  # how BasicSR registers what Real-ESRGAN registers too, and finds it
            return known[f'{name}_basicsr']
        elif name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f'did you mean {" or ".join(near)}?' if near else f'known are {", ".join(sorted(known))}'
            self.add(f"{where}: there is no {what} '{name}'; {hint}")
        return known.get(name)

    def arguments(self, where: str, function, given: dict, ours: tuple = (), supplied: tuple = ()) -> bool:
        """Check keys of a section against the parameters of what they are handed to.

        Args:
            ours: keys of the section that are not handed on.
            supplied: parameters that come from elsewhere.
        """
        parameters = inspect.signature(function).parameters
        named = [
            name
            for name, p in parameters.items()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in supplied
        ]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        needed = [name for name in named if parameters[name].default is inspect.Parameter.empty]
        given = {key: value for key, value in given.items() if key not in ('type', *ours)}
        return self.section(where, given, ' '.join(named), ' '.join(needed), only_known=not takes_any)

    def subsection(self, name: str) -> dict:
        """A section of the file, empty where it is missing or is none (which is told elsewhere)."""
        value = self.opt.get(name)
        return value if isinstance(value, dict) else {}

    def output_folder(self) -> Path:
        """The folder `experiments` or `results`, in which the run has a folder of its own."""
        key, name = ('experiments_root', 'experiments') if self.is_train else ('results_root', 'results')
        # BasicSR's master branch lets the option file choose the folder.
        return Path(os.path.expanduser(str(self.subsection('path').get(key) or self.root / name)))
