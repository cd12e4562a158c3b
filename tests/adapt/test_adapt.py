"""The whole way, with a tiny network: what is reported is true, and what is interrupted goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_psnr
from scenes import taken

from lora_sr.adapt import adapting, outcome, plan
from lora_sr.adapt.adapting import Adaptation, adapt
from lora_sr.adapt.held import Measured
from lora_sr.adapt.images import Images
from lora_sr.adapt.plan import schedule_for
from lora_sr.adapters import LoRAConfig, add_lora
from lora_sr.archs import SPAN
from lora_sr.checkpoints import NetworkSource, load_network
from lora_sr.cli.main import main
from lora_sr.data.lmdb_store import read_raw_meta_info
from lora_sr.deploy.merge import merge_checkpoint
from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale
from lora_sr.option_file import load_options
from lora_sr.report.comparison import compare

MINUTES = 0.1
ORDER = ['pairs', 'start', 'rates', 'plan', 'training', 'strength', 'outcome']
LONGER = 0.3  # in which a training gains, and does not end before it is told to


@pytest.fixture
def network(tmp_path):
    """The file of a tiny SPAN x2 that was never trained."""
    torch.manual_seed(0)
    span = SPAN(feature_channels=8, upscale=2, deploy=True)
    torch.save({'params': span.state_dict()}, tmp_path / 'span.pth')
    return tmp_path / 'span.pth'


def adaptation(network, folders, **values):
    return Adaptation(NetworkSource(network), Images(*folders), values.pop('minutes', MINUTES), **values)


def run(network, image):
    """Through a network, rounded to 8 bits: (H, W, 3), BGR."""
    with torch.no_grad():
        output = network(torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)[None] / 255)
    return output[0].clamp(0, 1).permute(1, 2, 0).mul(255).round().numpy().astype(np.uint8)[:, :, ::-1]


def mean_psnr(network, folder, small):
    """By BasicSR."""
    values = []
    for file in sorted((folder / 'HR').iterdir()):
        hr = cv2.imread(str(file))
        output = run(network, small(hr, cv2.imread(str(folder / 'LR' / file.name))))
        values.append(calculate_psnr(output, hr, crop_border=2, test_y_channel=True))
    return float(np.mean(values))


@pytest.mark.slow
def test_what_is_reported_is_true(camera, network, tmp_path):
    lines, folder = [], tmp_path / 'out'
    found = adapt(adaptation(network, camera(12), minutes=LONGER), folder, lines.append)
    assert found.has_gained and found.held == 2 and found.ended in ('finished', 'time')
    held = folder / 'data' / 'held'
    base, merged = load_network(network), load_network(folder / 'merged.pth')
    for measured, of in ((found.start, base), (found.result, merged)):
        assert mean_psnr(of, held, lambda hr, lr: lr) == pytest.approx(measured.camera, abs=0.02)
        assert mean_psnr(of, held, lambda hr, lr: bicubic_downscale(hr, 2)) == pytest.approx(measured.clean, abs=0.02)
    assert found.result.camera == max(one.camera for one in found.by_strength.values())

    # The merged network is the trained one at that strength, and the adapter gives it on the base.
    image = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = merged(image)
        on_base = load_network(NetworkSource(network, adapters=[(folder / 'adapter.safetensors', 1.0)]))(image)
    assert (on_base - expected).abs().max() <= 1e-5
    if found.strength == 1:
        merge_checkpoint(folder / 'experiments/adapt/models/net_g_best_held.pth', tmp_path / 'trained.pth')
        with torch.no_grad():
            assert (load_network(tmp_path / 'trained.pth')(image) - expected).abs().max() <= 1e-5

    table = compare({'before': network, 'after': folder / 'merged.pth'}, {'held': (held / 'HR', None)})
    clean = {row.name: row.quality['held'].psnr for row in table.rows}
    assert clean['before'] == pytest.approx(found.start.clean, abs=0.02)
    assert clean['after'] == pytest.approx(found.result.clean, abs=0.02)

    record = json.loads((folder / 'adapt.json').read_text())
    assert record['steps']['outcome']['sentence'] == str(found)
    rates, plan = (record['steps'][name] for name in ('rates', 'plan'))
    assert load_options(folder / 'train.yml')['train']['optim_g']['lr'] == plan['rate']
    wanted = rates['top'] * max(1, plan['iterations'] / rates['steps']) ** -0.25
    assert plan['rate'] == pytest.approx(wanted, rel=1e-2)
    step, validation = rates['step_seconds'], record['steps']['start']['seconds']
    schedule = schedule_for(plan['minutes'] * 60, step, validation)
    assert plan['iterations'] == schedule.iterations
    every = load_options(folder / 'train.yml')['val']['val_freq']
    assert every == max(1, schedule.iterations // schedule.validations)
    assert str(found).startswith(f'Your camera: {found.start.camera:.2f} -> {found.result.camera:.2f} dB (bicubic ')
    names = {pair for kind in ('training', 'held') for pair in record['steps']['pairs'][kind]}
    for kind in ('HR', 'LR'):  # what is held back is not trained on
        assert list(read_raw_meta_info(folder / f'data/{kind}_raw.lmdb')) == record['steps']['pairs']['training']
    assert len(names) == 12 and not set(record['steps']['pairs']['training']) & set(record['steps']['pairs']['held'])
    assert [line.split()[0] for line in lines[:3]] == ['pairs', 'network', 'start']

    # What comes on top of an adapter begins where it ended, and its file has both.
    more = adapt(
        adaptation(network, (tmp_path / 'HR', tmp_path / 'LR'), adapter=folder / 'adapter.safetensors'),
        tmp_path / 'more',
    )
    start = mean_psnr(merged, tmp_path / 'more' / 'data' / 'held', lambda hr, lr: lr)
    assert more.start.camera == pytest.approx(start, abs=0.02)
    if more.has_gained:
        both = NetworkSource(network, adapters=[(tmp_path / 'more' / 'adapter.safetensors', 1.0)])
        with torch.no_grad():
            expected = load_network(tmp_path / 'more' / 'merged.pth')(image)
            assert (load_network(both)(image) - expected).abs().max() <= 1e-5

    # A second call finds all done.
    lines.clear()
    again = adaptation(network, (tmp_path / 'HR', tmp_path / 'LR'), minutes=LONGER)
    assert adapt(again, folder, lines.append) == found
    assert not lines


@pytest.mark.slow
def test_it_goes_on_wherever_it_was_interrupted(camera, network, tmp_path):
    folders, folder, lines = camera(8), tmp_path / 'out', []

    class Interrupted(Exception):
        pass

    def until(word):
        def told(line):
            lines.append(line.split()[0])
            if lines[-1] == word:
                raise Interrupted

        return told

    for word in ('pairs', 'start', 'rate', 'strength'):
        if word == 'strength':
            timer = threading.Thread(target=_end_training, args=(folder,), daemon=True)
            timer.start()
        with pytest.raises(Interrupted):
            adapt(adaptation(network, folders, minutes=LONGER), folder, until(word))
    record = json.loads((folder / 'adapt.json').read_text())
    assert list(record['steps']) == ['pairs', 'start', 'rates', 'plan', 'training']
    assert record['steps']['training']['ended'] == 'interrupted' and record['steps']['training']['psnr']
    found = adapt(adaptation(network, folders, minutes=LONGER), folder, until(None))
    assert found.ended == 'interrupted' and (folder / 'merged.pth').exists() == found.has_gained
    assert lines.count('network') == 1 and lines.count('training') == 1  # of what was done nothing is done again
    assert 0 < record['seconds'] < 120


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere a training outlives whoever began it')
def test_ctrl_c_and_a_kill_in_each_step(camera, network, tmp_path):
    hr, lr = map(str, camera(8))
    folder = tmp_path / 'out'
    call = [sys.executable, '-m', 'lora_sr.cli.main', 'adapt', str(network), '--pairs', hr, lr, '-o', str(folder)]
    call += ['--minutes', str(LONGER)]

    def begun(word):
        process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert any(line.startswith(word) for line in process.stdout)  # read up to there
        return process

    def killed(word):
        process = begun(word)
        process.kill()
        process.communicate()
        found = list(steps(folder))
        assert found == ORDER[: len(found)]
        return len(found)

    assert killed('pairs') <= 1  # it may have gone on before the signal came
    assert 1 <= killed('start') <= 2
    assert 2 <= killed('rate') <= 3
    process = begun('training')
    process.send_signal(signal.SIGINT)  # before it has validated, so that nothing is the best so far
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and told.splitlines()[-1] == 'lora-sr: interrupted'
    assert list(steps(folder)) == ORDER[:4]

    process = begun('training')
    metrics = folder / 'experiments' / 'adapt' / 'metrics.jsonl'
    wait_for(lambda: metrics.exists() and 'validation' in metrics.read_text())
    process.kill()
    process.communicate()
    wait_for(lambda: 'stopped' in metrics.read_text().splitlines()[-1])  # the training ends with it, and saves
    assert list(steps(folder)) == ORDER[:4]

    assert 5 <= killed('strength') <= 6
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'training ' not in done.stdout and done.stdout.splitlines()[-1].startswith('Your camera: ')
    training = steps(folder)['training']
    assert training['ended'] == 'finished' and training['iterations'] == steps(folder)['plan']['iterations']


def steps(folder):
    return json.loads((folder / 'adapt.json').read_text())['steps']


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _end_training(folder):
    """Ctrl-C, once the training has validated."""
    metrics = folder / 'experiments' / 'adapt' / 'metrics.jsonl'
    wait_for(lambda: metrics.exists() and 'validation' in metrics.read_text())
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_nothing_gained(camera, network, tmp_path, monkeypatch, capsys):
    hr, lr = map(str, camera(4))
    monkeypatch.setattr(outcome, 'LEAST_GAIN', 100.0)
    call = ['adapt', str(network), '--pairs', hr, lr, '-o', str(tmp_path / 'out'), '--minutes', '0.1']
    with pytest.raises(SystemExit) as status:
        main(call)
    assert status.value.code == 3
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith('Nothing was gained: your camera ')
    assert told[-2] == f'wrote {tmp_path}/out/report.html'
    report = (tmp_path / 'out' / 'report.html').read_text()
    assert 'Nothing was gained: your camera ' in report and 'Most improved' in report
    assert not (tmp_path / 'out' / 'merged.pth').exists() and not (tmp_path / 'out' / 'adapter.safetensors').exists()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['photos', 'teacher'])
def test_without_pairs(camera, network, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(adapting, 'side_for', lambda *values: 512)  # whole images, however slow the machine is
    hr, lr = camera(6)
    images = Images(hr=hr) if kind == 'photos' else Images(lr=lr, teacher=NetworkSource(network))
    minutes = LONGER if kind == 'photos' else MINUTES
    found = adapt(Adaptation(NetworkSource(network), images, minutes), tmp_path / 'out')
    if kind == 'photos':
        assert found.has_gained and len(os.listdir(tmp_path / 'out' / 'degraded')) == 6
    else:  # the network itself has nothing to teach
        assert not found.has_gained and found.start.camera > 60


def test_its_option_file_is_one_of_basicsr(camera, network, tmp_path, monkeypatch):
    monkeypatch.setattr(adapting, 'find_rate', _stop)
    with pytest.raises(_Stop):
        adapt(adaptation(network, camera(4), share=0.3), tmp_path / 'out')
    options = load_options(tmp_path / 'out' / 'train.yml')
    assert options['network_g']['base'] == {
        'type': 'SPAN',
        'num_in_ch': 3,
        'num_out_ch': 3,
        'feature_channels': 8,
        'upscale': 2,
        'norm': True,
        'deploy': True,
    }
    assert options['network_g']['lora']['groups'] == ['all'] and options['scale'] == 2
    monkeypatch.chdir(tmp_path / 'out')
    from lora_sr.basicsr.options import check_options

    assert not check_options(options, is_train=True)


def test_threads_are_chosen_again_before_each_timing(camera, network, tmp_path, monkeypatch):
    order = []

    def noted(name, original):
        return lambda *arguments, **options: order.append(name) or original(*arguments, **options)

    monkeypatch.setattr(adapting.threads, 'look_again', lambda: order.append('look'))
    monkeypatch.setattr(adapting, 'batches_for', noted('batches', adapting.batches_for))
    monkeypatch.setattr(adapting, 'find_rate', noted('rates', _stop))
    with pytest.raises(_Stop):
        adapt(adaptation(network, camera(4)), tmp_path / 'out')
    assert order == ['look', 'batches', 'look', 'rates']


def test_what_comes_once_is_no_part_of_a_validation(camera, network, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def measure(*arguments, has_clean=True, **options):
        clock.now += 1 if clock.now else 100
        return Measured(20.0, 30.0)

    monkeypatch.setattr(adapting.time, 'perf_counter', lambda: clock.now)
    monkeypatch.setattr(adapting, 'batches_for', lambda *arguments: plan.Batches(1, 24, 1e-6))
    monkeypatch.setattr(adapting, 'measure', measure)
    monkeypatch.setattr(adapting, 'find_rate', _stop)
    with pytest.raises(_Stop):
        adapt(adaptation(network, camera(4)), tmp_path / 'out')
    assert steps(tmp_path / 'out')['start']['seconds'] == 1


class _Stop(Exception):
    pass


def _stop(*arguments, **options):
    raise _Stop


@pytest.mark.parametrize(
    ('values', 'sentence'),
    [
        ({'minutes': 0}, '--minutes must be above 0 and at most 10,080, got 0.'),
        ({'minutes': float('nan')}, '--minutes must be above 0 and at most 10,080, got nan.'),
        ({'share': 1.5}, '--share must be above 0% and at most 100%, got 150%.'),
        ({'share': 1e-4}, 'at which LoRA has rank 1, got 0.01%'),
    ],
)
def test_wrong_values(camera, network, tmp_path, values, sentence):
    with pytest.raises(InputError) as error:
        adapt(adaptation(network, camera(4), **values), tmp_path / 'out')
    assert sentence in str(error.value) and not (tmp_path / 'out').exists()


def test_folders_of_images_that_are_none(camera, network, tmp_path):
    hr, _ = camera(4)
    (tmp_path / 'file').write_text('')
    for name, words in (('nowhere', 'nothing of that name'), ('file', 'a file')):
        with pytest.raises(InputError, match=rf'must be in a folder, got {tmp_path}/{name}, which is {words}\.'):
            adapt(adaptation(network, (hr, tmp_path / name)), tmp_path / 'out')
        assert not (tmp_path / 'out').exists()


def test_networks_that_cannot_be_adapted(camera, network, tmp_path):
    folders = camera(4)
    adapted = add_lora(load_network(network), LoRAConfig(groups=['all'], rank=1))
    torch.save(adapted.state_dict(), tmp_path / 'adapted.pth')
    for source, words in (
        (tmp_path / 'adapted.pth', 'carries LoRA already'),
        (load_network(network), 'must be a file'),
    ):
        with pytest.raises(InputError, match=words):
            adapt(adaptation(source, folders), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_folders_that_are_taken(camera, network, tmp_path, monkeypatch):
    folders = camera(4)
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'mine.txt').write_text('mine')
    with pytest.raises(InputError, match='must be an empty folder or none, got mine.txt in it'):
        adapt(adaptation(network, folders), tmp_path / 'full')
    monkeypatch.setattr(adapting, 'find_rate', _stop)
    with pytest.raises(_Stop):
        adapt(adaptation(network, folders), tmp_path / 'out')
    with pytest.raises(InputError, match=r'has an adaptation with another minutes, 0\.1, got 5'):
        adapt(adaptation(network, folders, minutes=5), tmp_path / 'out')
    (tmp_path / 'out' / 'adapt.json').write_text('{')
    with pytest.raises(InputError, match='cannot be read: choose another output folder'):
        adapt(adaptation(network, folders), tmp_path / 'out')


def test_a_kill_while_images_are_written(camera, network, tmp_path, monkeypatch):
    hr, lr = camera(4)
    folder, images = tmp_path / 'out', Images(hr=hr)
    for name in ('write_held', 'write_state'):
        monkeypatch.setattr(adapting, name, _stop)  # what a kill leaves, but for the process
        with pytest.raises(_Stop):
            adapt(Adaptation(NetworkSource(network), images, MINUTES), folder)
        monkeypatch.undo()
        assert {'adapt.json', 'degraded'} < set(os.listdir(folder))
    monkeypatch.setattr(adapting, 'find_rate', _stop)
    # Nothing was done yet, so that another call may begin there as well.
    with pytest.raises(_Stop):
        adapt(adaptation(network, (hr, lr)), folder)
    assert sorted(os.listdir(folder / 'data')) == ['HR_raw.lmdb', 'LR_raw.lmdb', 'held']
    assert list(json.loads((folder / 'adapt.json').read_text())['steps']) == ['pairs', 'start']


@pytest.mark.parametrize(('moved', 'side'), [(6, 48), (0, 64)])
def test_patches_fit_what_alignment_leaves(camera, network, tmp_path, monkeypatch, moved, side):
    """LR images are 64 pixels high, of which a shift takes three."""
    folders = camera(4, lambda hr: taken(np.roll(hr, moved, 0)))
    monkeypatch.setattr(plan, '_seconds', lambda run: 1e-9)
    monkeypatch.setattr(adapting, 'find_rate', _stop)
    with pytest.raises(_Stop):
        adapt(adaptation(network, folders, aligns=True), tmp_path / 'out')
    assert steps(tmp_path / 'out')['pairs']['side'] == side


def test_alignment_is_for_pairs(camera, network, tmp_path):
    hr, _ = camera(4)
    with pytest.raises(InputError, match='--align must be left out without --pairs'):
        adapt(Adaptation(NetworkSource(network), Images(hr=hr), aligns=True), tmp_path / 'out')


@pytest.mark.parametrize('kind', ['photos', 'teacher'])
def test_images_of_which_none_is_made(camera, network, tmp_path, monkeypatch, kind):
    hr, lr = camera(5)
    broken = (hr if kind == 'photos' else lr) / '01.png'
    broken.write_bytes(b'not an image')
    images = Images(hr=hr) if kind == 'photos' else Images(lr=lr, teacher=NetworkSource(network))
    monkeypatch.setattr(adapting, 'find_rate', _stop)
    lines = []
    with pytest.raises(_Stop):
        adapt(Adaptation(NetworkSource(network), images), tmp_path / 'out', lines.append)
    told = [line for line in lines if line.startswith('left out')]
    assert len(told) == 1 and f'{broken} is damaged' in told[0]
    assert list(steps(tmp_path / 'out')['pairs']['left_out']) == [str(broken)]


def test_two_at_once(camera, network, tmp_path, monkeypatch):
    folders = camera(4)

    def again(*arguments, **options):
        with pytest.raises(InputError, match='Another adaptation is at work in'):
            adapt(adaptation(network, folders), tmp_path / 'out')
        raise _Stop

    monkeypatch.setattr(adapting, 'find_rate', again)
    with pytest.raises(_Stop):
        adapt(adaptation(network, folders), tmp_path / 'out')


def test_a_full_disk(camera, network, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(adapting, 'write_training_pairs', full)
    with pytest.raises(InputError, match='cannot be written: No space left on device'):
        adapt(adaptation(network, camera(4)), tmp_path / 'out')
    assert not (tmp_path / 'out' / 'data').exists()


def test_gray_images(camera, network, tmp_path, monkeypatch):
    hr, lr = camera(4)
    for file in (*hr.iterdir(), *lr.iterdir()):
        cv2.imwrite(str(file), cv2.imread(str(file), cv2.IMREAD_GRAYSCALE))
    monkeypatch.setattr(adapting, 'find_rate', _stop)
    with pytest.raises(_Stop):
        adapt(adaptation(network, (hr, lr)), tmp_path / 'out')
    held = next((tmp_path / 'out/data/held/HR').iterdir())
    assert cv2.imread(str(held), cv2.IMREAD_UNCHANGED).shape[2] == 3
