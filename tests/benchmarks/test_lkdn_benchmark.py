"""`lora-sr bench lkdn`: it compares like with like, and says so."""

import re

import pytest
import torch

from lora_sr.archs.lkdn import LKDN
from lora_sr.benchmarks import lkdn as lkdn_benchmark
from lora_sr.benchmarks.lkdn import with_official_structure


def small():
    torch.manual_seed(0)
    return LKDN(num_feat=6, num_atten=4, num_block=2)


def attention_runs_on_a_copy(network):
    """Whether the attention of the first block reads other memory than the layer before it wrote."""
    seen = {}
    block = network.B1
    block.c5.register_forward_hook(lambda module, inputs, output: seen.update(written=output))
    block.atten.pointwise.register_forward_pre_hook(lambda module, inputs: seen.update(read=inputs[0]))
    network(torch.rand(1, 3, 8, 8))
    return seen['written'].data_ptr() != seen['read'].data_ptr()


def test_the_official_structure_copies_more_and_has_the_same_weights_and_output():
    ours = small()
    authors = with_official_structure(ours)
    x = torch.rand(1, 3, 12, 10)
    torch.testing.assert_close(authors(x), ours(x), rtol=1e-5, atol=1e-6)
    assert attention_runs_on_a_copy(authors) and not attention_runs_on_a_copy(ours)
    kept = ours.B1.pixel_norm.weight
    assert torch.equal(authors.B1.pixel_norm.norm.weight, kept) and authors.B1.pixel_norm.norm.weight is not kept
    features = torch.rand(1, 6, 4, 5).permute(0, 2, 3, 1)
    normed = authors.B1.pixel_norm(features)
    assert normed.permute(0, 3, 1, 2).is_contiguous() and torch.equal(normed, ours.B1.pixel_norm(features))


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(lkdn_benchmark, 'LKDN', small)
    lkdn_benchmark.run((1, 3, 12, 10), (2, 3, 8, 8), repeats=2)
    printed = capsys.readouterr().out
    for form in ('ours', 'authors'):
        for memory_format in ('contiguous', 'channels_last'):
            assert re.search(rf'^{form}, {memory_format}( +[\d.]+ s){{3}}$', printed, re.M)
    assert len(re.findall(r'^authors / ours( +[\d.]+){3}$', printed, re.M)) == 2
    assert 'differ by' in printed.splitlines()[-1]


def test_outputs_that_differ_are_no_benchmark(monkeypatch):
    def with_other_weights(network):
        other = with_official_structure(network)
        torch.nn.init.ones_(other.c1.weight)
        return other

    monkeypatch.setattr(lkdn_benchmark, 'LKDN', small)
    monkeypatch.setattr(lkdn_benchmark, 'with_official_structure', with_other_weights)
    with pytest.raises(RuntimeError, match='the outputs of the two structures differ'):
        lkdn_benchmark.run((1, 3, 12, 10), (2, 3, 8, 8), repeats=1)
