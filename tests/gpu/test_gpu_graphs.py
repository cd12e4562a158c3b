"""A recording that fails: what it says, and that the GPU goes on as if there had been none."""

import pytest
import torch

from lora_sr.runtime.cuda_graphs import capture

pytestmark = pytest.mark.gpu
SIZE = 1 << 24


def wait() -> None:
    """What no graph can hold, after some memory has been taken."""
    torch.rand(SIZE, device='cuda').sum().item()


def break_off() -> None:
    """What a graph could hold, up to an error that has nothing to do with it."""
    value = torch.rand(SIZE, device='cuda')
    raise KeyError(value.shape)


def test_the_reason_is_that_of_the_operation():
    with pytest.raises(RuntimeError, match='capturing'):
        capture(wait)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_random_numbers_go_on():
    torch.manual_seed(1)
    expected = torch.rand(3, device='cuda')
    torch.manual_seed(1)
    with pytest.raises(RuntimeError):
        capture(wait)
    assert torch.equal(torch.rand(3, device='cuda'), expected)


@pytest.mark.parametrize(('fail', 'error'), [(wait, RuntimeError), (break_off, KeyError)])
def test_the_memory_is_free(fail, error):
    """Also where torch could end the recording, and gives the memory back by itself."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.raises(error):
        capture(fail)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


def test_memory_of_two_streams_is_used_again():
    """The allocator waits with it while something is recorded."""
    with pytest.raises(RuntimeError):
        capture(wait)
    side = torch.cuda.Stream()
    value = torch.zeros(SIZE, device='cuda')
    value.record_stream(side)
    place = value.data_ptr()
    del value
    torch.cuda.synchronize()
    assert torch.zeros(SIZE, device='cuda').data_ptr() == place


def test_the_next_one_succeeds():
    with pytest.raises(RuntimeError):
        capture(wait)
    source = torch.zeros(4, device='cuda')
    graph, result = capture(lambda: source + 1)
    source.fill_(2)
    graph.replay()
    assert result.tolist() == [3, 3, 3, 3]
