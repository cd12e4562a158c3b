"""The whole step as one CUDA graph; on the CPU a graph is pretended: what was recorded runs again at each replay."""

import contextlib

import pytest
import torch
from tiny_steps import assert_near, built, steps, weights

from lora_sr.basicsr.step import graph as graph_module


class PretendedGraph:
    """Runs a step again with the learning rates that were there when it was recorded, whatever they are now.

    The results go where the recording put them, as those of a graph do, and to record changes no weights.
    """

    def __init__(self, model, run):
        self.model, self.run, self.replays = model, run, 0
        self.rates = [[group['lr'] for group in one.param_groups] for one in model.optimizers]
        states = [value for one in model.optimizers for state in one.state.values() for value in state.values()]
        tensors = [*weights(model).values(), *(value for value in states if isinstance(value, torch.Tensor))]
        before = [value.clone() for value in tensors]
        run()
        self.log, self.output = model.log_dict, model.output
        for value, kept in zip(tensors, before):
            value.copy_(kept)

    def replay(self):
        self.replays += 1
        with graph_module._rates(self.model.optimizers, self.rates):
            self.run()
        self.log.update(self.model.log_dict)
        self.output.data.copy_(self.model.output)


@pytest.fixture
def pretended(monkeypatch):
    """A function: build a model whose steps are recorded, and give back the list of its graphs."""
    monkeypatch.setattr(graph_module, '_beside', contextlib.nullcontext)
    monkeypatch.setattr(graph_module, '_refusal', lambda step: '')

    def build(opt):
        model, graphs = built(opt), []

        def capture(run):
            graphs.append(PretendedGraph(model, run))
            return graphs[-1], None

        monkeypatch.setattr(graph_module, 'capture', capture)
        return model, graphs

    return build


@pytest.mark.parametrize(
    ('kind', 'train', 'recorded'),
    [
        ('SRModel', {}, 1),
        ('DistillationModel', {'accumulate_iter': 2, 'clip_grad_norm': 1.0}, 1),
        ('RealESRGANModel', {'net_d_iters': 2, 'net_d_init_iters': 4}, 2),
    ],
)
def test_replayed_steps_are_those_without(options, pretended, kind, train, recorded):
    """The batches, learning rates that change, and the iterations in which the discriminator learns alone."""
    train['scheduler'] = {'type': 'MultiStepLR', 'milestones': [8, 11], 'gamma': 0.3}
    plain, (model, graphs) = built(options(kind, **train)), pretended(options(kind, **train, graph=True))
    assert_near(steps(model, 1, 16), steps(plain, 1, 16), 1e-5)
    assert len(graphs) == recorded and sum(graph.replays for graph in graphs) == 16 - recorded * graph_module.WARM_UP
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.output, plain.output, rtol=1e-4, atol=1e-5)
    assert model.get_current_learning_rate() == plain.get_current_learning_rate()


def test_what_cannot_be_recorded_runs_without(options, pretended, monkeypatch, basicsr_log):
    def refuse(run):
        raise RuntimeError('operation not permitted when stream is capturing')

    plain, (model, _) = built(options('SRModel')), pretended(options('SRModel', graph=True))
    monkeypatch.setattr(graph_module, 'capture', refuse)
    assert_near(steps(model, 1, 6), steps(plain, 1, 6), 0)
    told = [record.getMessage() for record in basicsr_log.records if 'train.graph' in record.getMessage()]
    assert told == [
        'train.graph: the step could not be recorded (RuntimeError: operation not permitted when stream is capturing); '
        'the steps run without.'
    ]


def test_a_cpu_has_no_graph(options, basicsr_log):
    steps(built(options('SRModel', graph=True)), 1, 1)
    assert 'train.graph: a CUDA graph needs a GPU; the steps run without.' in basicsr_log.text
