"""What an adaptation has come to, of numbers written by hand."""

import pytest
from tiny_adaptation import record

from lora_sr.adapt.outcome import Outcome


def outcome(camera, clean):
    """Of strengths 0.5, 1 and 1.25 with these PSNR, of a network that had 23 and 31.5 dB."""
    steps = record(['00', '01'], True, 'SPAN.pth')['steps']
    rows = zip(('0.5', '1', '1.25'), camera, clean)
    steps['strength'] = {one: {'camera': first, 'clean': second} for one, first, second in rows}
    return Outcome.of(steps)


@pytest.mark.parametrize(
    ('camera', 'strength'),
    [((23.5, 24.5, 24.25), 1.0), ((23.5, 24.5, 25), 1.25), ((24, 24, 23), 0.5), ((22, 22.5, 22.75), 1.25)],
)
@pytest.mark.parametrize('clean', [(31, 30, 29), (32, 33, 34), (31, 35, 31)])
def test_the_strength_is_the_best_for_the_camera_whatever_is_clean(camera, clean, strength):
    found = outcome(camera, clean)
    place = (0.5, 1.0, 1.25).index(strength)
    assert found.strength == strength
    assert (found.result.camera, found.result.clean) == (camera[place], clean[place])
    assert found.gain == camera[place] - 23 and found.has_gained == (camera[place] > 23)


def test_the_sentence():
    assert str(outcome((23.5, 24.5, 24.25), (31, 30, 29))) == (
        'Your camera: 23.00 -> 24.50 dB (bicubic 22.50), on 2 pairs held back; '
        'bicubic images: 31.50 -> 30.00 dB at strength 1, 31.00 at 0.5: keep the base beside it.'
    )
    assert str(outcome((23.5, 24.5, 24.25), (31.5, 31.49, 29))).endswith(
        'bicubic images: 31.50 -> 31.49 dB at strength 1, 31.50 at 0.5.'
    )
    assert str(outcome((22, 23.01, 22), (31, 30, 29))) == (
        'Nothing was gained: your camera 23.00 -> 23.01 dB (bicubic 22.50) on 2 pairs held back. The network stays as '
        'it is; no merged network was written.'
    )
    assert 'on 1 pair held back' in str(Outcome.of(record(['00'], True, 'SPAN.pth')['steps']))


def test_a_training_that_left_nothing():
    steps = record(['00'], False, 'SPAN.pth')['steps']
    found = Outcome.of({**steps, 'strength': {}})
    assert found.strength == 0 and found.result == found.start and not found.has_gained
