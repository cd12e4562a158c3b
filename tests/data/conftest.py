"""What the tests of `lora-sr prepare` share."""

import pytest

from lora_sr.cli.main import main


@pytest.fixture
def refused(tmp_path, capfd):
    """A function: the one sentence on stderr that these arguments are refused with, status 2 and nothing written."""

    def message(*arguments, output=tmp_path / 'out'):
        capfd.readouterr()
        assert main(['prepare', *map(str, arguments), '-o', str(output)]) == 2
        assert not (tmp_path / 'out').exists()
        out, err = capfd.readouterr()
        assert not out and err.startswith('lora-sr: error: ') and err.endswith('.\n'), err
        assert all(line.startswith('  ') and line.endswith('.') for line in err.splitlines()[1:]), err
        return err[len('lora-sr: error: ') : -1]

    return message
