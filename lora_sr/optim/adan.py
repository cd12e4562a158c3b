"""Adan, adaptive Nesterov momentum: the authors' trajectory, with all tensors updated together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any, Callable

import adan_pytorch
import torch
from torch import Tensor

from lora_sr.errors import InputError

# What a parameter's state holds, under the names of adan_pytorch.
STATE = {'step', 'prev_grad', 'm', 'v', 'n'}


class Adan(adan_pytorch.Adan):
    """Adan as in its authors' code. With the gradient g and the one before it, g_prev (at first g itself), a step is

    - d = g - g_prev
    - m = beta1 * m + (1 - beta1) * g
    - v = beta2 * v + (1 - beta2) * d
    - n = beta3 * n + (1 - beta3) * (g + beta2 * d)^2
    - p = (p - lr * (m' + beta2 * v') / (sqrt(n') + eps)) / (1 + lr * weight_decay)

    where m, v and n start at 0, and m', v' and n' are they, divided by 1 - beta^k of the parameter's own step k.

    Source: arXiv:2208.06677, Algorithm 1, without restarts. Each beta of the formulas there, and of
    ``adan_pytorch.Adan``, is one minus the beta here, which is that of the authors' code and of LKDN's option files.
    The first step of ``adan_pytorch.Adan`` moves nothing, and it updates one tensor after the other.

    The state of a parameter is ``step`` (the number of its steps: an int, or a scalar on its device if ``capturable``,
    which those that have always stepped together share), ``prev_grad``, ``m``, ``v`` and ``n`` (each of the parameter's
    shape). A parameter without a gradient is left out.

    Args:
        params: Parameters, or dictionaries that each hold some under ``params`` and options of their own.
        lr: Learning rate, at least 0.
        betas: beta1, beta2 and beta3, each at least 0 and less than 1.
        eps: Added to the denominator, at least 0.
        weight_decay: At least 0. It is decoupled from the gradient, and proximal: a division after the update.
        foreach: As for torch's optimizers: update all tensors together, which needs as much memory again as the
            parameters while a step lasts; or one after the other, which is slower and needs as much as the largest.
        capturable: As for torch's optimizers: a step may be recorded by a CUDA graph, as it counts on the device. Then
            ``lr`` of a parameter group may be a scalar on that device. Where nothing is recorded it is slower.

    Raises:
        InputError: A value beyond its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool = True,
        capturable: bool = False,
    ) -> None:
        check_values({'lr': lr, 'betas': betas, 'eps': eps, 'weight_decay': weight_decay})
        check_values({'foreach': foreach, 'capturable': capturable})
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for options in (self.defaults, *self.param_groups):
            options.pop('restart_cond', None)  # a function, which no state dict should hold
            options.setdefault('foreach', foreach)
            options.setdefault('capturable', capturable)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own where ``param_group`` has them.

        Raises:
            InputError: A value beyond its range.
        """
        check_values(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict()`` gave.

        Raises:
            InputError: It is from another optimizer; ``adan_pytorch.Adan`` is another, as its betas are.
        """
        groups = state_dict['param_groups']
        foreign = any(state.keys() != STATE for state in state_dict['state'].values())
        if foreign or any('restart_cond' in group or len(group.get('betas', ())) != 3 for group in groups):
            options = ', '.join(key for key in groups[0] if key != 'params')
            raise InputError(
                f'The state to resume is not of Adan, but of an optimizer with the options {options}: '
                'go on with that optimizer, or begin anew.'
            )
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # of a version that knew neither
            group.setdefault('foreach', True)
            group.setdefault('capturable', False)
            self._count_as(group)

    def _count_as(self, group: dict[str, Any]) -> None:
        """Bring the counts of a group's steps, whatever wrote them, into the form that ``capturable`` wants."""
        shared: dict[tuple[int, torch.device], Tensor] = {}
        for param in group['params']:
            state = self.state.get(param)
            if state:
                count = int(state['step'])
                state['step'] = count
                if group['capturable']:
                    key = count, param.device
                    state['step'] = shared.setdefault(key, torch.tensor(float(count), device=param.device))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            The loss of ``closure``, or None.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, tensors in self._batches(group):
                params, grads, prev_grads, m, v, n = tensors
                numbers = group['lr'], group['betas'], group['eps'], group['weight_decay']
                _update(params, grads, prev_grads, m, v, n, step, *numbers)
        return loss

    def _batches(self, group: dict[str, Any]) -> Iterator[tuple[int | Tensor, Iterator[tuple[Tensor, ...]]]]:
        """Count a step for each parameter with a gradient, and yield the tensors that can be updated together.

        With the number of the step it yields parameters, gradients, and their ``prev_grad``, ``m``, ``v`` and ``n``.
        """
        # Nearly always this is one batch: all tensors of a network have the same device, type and number of steps.
        batches: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = defaultdict(list)
        counters = _Counters(self.state, group['params']) if group['capturable'] else None
        for index, param in enumerate(group['params']):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f'Adan needs dense gradients, but that of a parameter of shape {tuple(param.shape)} is sparse '
                    f'({grad.layout}); such a parameter needs an optimizer of its own, e.g. torch.optim.SparseAdam'
                )
            state = self.state[param]
            if not state:
                state.update(step=0, prev_grad=grad.clone())
                state.update((name, torch.zeros_like(param)) for name in 'mvn')
            if counters is None:
                state['step'] += 1
            else:
                state['step'] = counters.counted(state['step'], param.device)
            key = param.device, param.dtype, state['step'], None if group['foreach'] else index
            batches[key].append((param, grad, state['prev_grad'], state['m'], state['v'], state['n']))
        for (_, _, step, _), rows in batches.items():
            yield step, zip(*rows)


class _Counters:
    """The numbers of steps of a group's parameters, as scalars on their devices, each counted once in a step.

    One that parameters share without having a gradient is left to them, and those that step get a copy.

    Args:
        state: Of the optimizer.
        params: Of the group.
    """

    def __init__(self, state: dict[Tensor, Any], params: list[Tensor]):
        self._resting = {id(state[param]['step']) for param in params if param.grad is None and state.get(param)}
        self._counted: dict[tuple[int, torch.device], tuple[Any, Tensor]] = {}

    def counted(self, step: int | Tensor, device: torch.device) -> Tensor:
        """The counter that follows on a parameter's: the same for all that shared one."""
        key = id(step), device
        if key not in self._counted:
            if not isinstance(step, Tensor):
                after = torch.full((), float(step), device=device)
            else:
                after = step.clone() if id(step) in self._resting else step
            self._counted[key] = step, after.add_(1)  # with the former kept, whose id stands for it
        return self._counted[key][1]


def check_values(options: dict[str, Any]) -> None:
    """Raise InputError for the first of Adan's options with a value that it cannot have; others are not looked at."""

    def is_number(value: object) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

    for key in ('lr', 'eps', 'weight_decay'):
        value = options.get(key, 0)
        if not is_number(value) or value < 0:
            raise InputError(f'"{key}" of Adan must be a number of at least 0, got {value!r}.')
    betas = options.get('betas', (0, 0, 0))
    are_three = isinstance(betas, (list, tuple)) and len(betas) == 3
    if not are_three or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise InputError(
            f'"betas" of Adan must be three numbers of at least 0 and less than 1, e.g. [0.98, 0.92, 0.99], got '
            f'{betas!r}.'
        )
    for key in ('foreach', 'capturable'):
        value = options.get(key, True)
        if not isinstance(value, bool):
            raise InputError(f'"{key}" of Adan must be true or false, got {value!r}.')


def _update(
    params: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    prev_grads: tuple[Tensor, ...],
    m: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    n: tuple[Tensor, ...],
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update tensors of one device and type, all at their step number ``step``.

    Each call of torch is few kernels on a GPU and one pass over the memory elsewhere, so their number counts.
    """
    beta1, beta2, beta3 = betas
    # A scalar on the device is as exact as Python's numbers, in whose place it stands.
    step = step.double() if isinstance(step, Tensor) else step
    correction1, correction2, root3 = 1 - beta1**step, 1 - beta2**step, (1 - beta3**step) ** 0.5

    differences = torch._foreach_sub(grads, prev_grads)
    torch._foreach_lerp_(m, grads, 1 - beta1)
    torch._foreach_lerp_(v, differences, 1 - beta2)
    del differences  # the memory is wanted below

    # g_prev + (1 + beta2) * d is g + beta2 * d, and the place of g_prev is free for it until it becomes g.
    torch._foreach_lerp_(prev_grads, grads, 1 + beta2)
    torch._foreach_mul_(n, beta3)
    torch._foreach_addcmul_(n, prev_grads, prev_grads, 1 - beta3)
    torch._foreach_lerp_(prev_grads, grads, 1.0)  # a copy, for which torch 2.0 has no call

    denominators = torch._foreach_sqrt(n)
    if not isinstance(step, Tensor):
        # Numerator and denominator are multiplied by root3: n' would be a pass more.
        torch._foreach_add_(denominators, eps * root3)
        for moments, factor in ((m, -lr * root3 / correction1), (v, -lr * beta2 * root3 / correction2)):
            torch._foreach_addcdiv_(params, moments, denominators, factor)
        if weight_decay:
            torch._foreach_div_(params, 1 + lr * weight_decay)
        return
    dtype = params[0].dtype  # in which a scalar tensor is a factor of a whole list; to add one would wait for it
    torch._foreach_div_(denominators, torch.as_tensor(root3).to(dtype))
    torch._foreach_add_(denominators, eps)
    for moments, factor in ((m, -lr / correction1), (v, -lr * beta2 / correction2)):
        quotients = torch._foreach_div(moments, denominators)
        torch._foreach_mul_(quotients, torch.as_tensor(factor).to(dtype))
        torch._foreach_add_(params, quotients)
    if weight_decay:
        divisor = 1 + lr * weight_decay
        torch._foreach_div_(params, divisor.to(dtype) if isinstance(divisor, Tensor) else divisor)
