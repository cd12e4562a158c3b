"""The record of a run: the option file in its folder."""

import pytest
import yaml

from lora_sr.basicsr import provenance


@pytest.mark.parametrize('place', ['beside', 'here', 'home'])
def test_the_record_names_files_to_import_by_their_whole_paths(tmp_path, monkeypatch, place):
    """The record stands in another folder than the option file, and must find what the option file found."""
    folders = {name: tmp_path / name for name in ('beside', 'here', 'home', 'run')}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.chdir(folders['here'])
    monkeypatch.setenv('HOME', str(folders['home']))
    monkeypatch.setenv('USERPROFILE', str(folders['home']))
    module = folders[place] / 'own_arch.py'
    module.write_text('')
    for state in ('_effective', '_overrides', '_text'):
        monkeypatch.setattr(provenance, state, getattr(provenance, state))  # puts it back
    options = {'name': 'run', 'imports': ['~/own_arch.py' if place == 'home' else 'own_arch.py', 'math']}
    file = folders['beside'] / 'run.yml'
    file.write_text(yaml.safe_dump(options))

    provenance.begin(str(file), options, None)
    provenance.write_options(str(file), str(folders['run']))

    record = yaml.safe_load((folders['run'] / 'run.yml').read_text())
    assert record == {'name': 'run', 'imports': [str(module), 'math']}
