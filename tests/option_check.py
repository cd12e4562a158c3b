"""The check of an option file, and the places in one."""

from lora_sr.basicsr.options import check_options


def check(options, tmp_path, is_train=True):
    return check_options(options, is_train, tmp_path)


def paths_of(section: dict, start: str = '') -> list[str]:
    """Every key of an option file, as `a.b.c`."""
    found = []
    for key, value in section.items():
        found += [f'{start}{key}', *(paths_of(value, f'{start}{key}.') if isinstance(value, dict) else [])]
    return found
