"""The optimizer: Muon for the matrices, Adam for embeddings and norms, both under the circuit's masks.

Muon (momentum whose update is made orthogonal) learns more per token than Adam on few tokens, which is what a CPU can
afford. A masked-out entry keeps its value exactly: its gradient and its update are both set to zero.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Keller Jordan's quintic iteration


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak learning rates, each multiplied by the schedule."""

    matrices: float = 0.02
    embedding: float = 0.003
    norms: float = 0.003
    momentum: float = 0.95
    weight_decay: float = 0.01  # of matrices without a mask, relative to the learning rate


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: [N, R, C] -> [N, R, C] bfloat16, singular values about 1."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).bfloat16() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.transpose(1, 2) if tall else x


class MaskedMuon:
    """Muon and Adam over named parameters; `state_dict` holds every buffer, so a resumed run goes on bit for bit."""

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor],
        rates: Rates,
        tables: Collection[str] = ("embed_tokens.weight",),
    ) -> None:
        """tables: names of embeddings and heads, whose rows are tokens. Fixed parameters are left alone."""
        self.rates = rates
        self.masks = masks
        self.parameters = {
            n: p for n, p in model.named_parameters() if p.requires_grad and (n not in masks or bool(masks[n].any()))
        }
        self.matrices = [n for n, p in self.parameters.items() if p.ndim == 2 and n not in tables]
        self.others = [n for n in self.parameters if n not in self.matrices]
        self.step_count = 0
        self.momentum = {n: torch.zeros_like(self.parameters[n]) for n in self.matrices}
        self.first = {n: torch.zeros_like(self.parameters[n]) for n in self.others}
        self.second = {n: torch.zeros_like(self.parameters[n]) for n in self.others}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the peak rates, then forget the gradients."""
        self.step_count += 1
        for name, mask in self.masks.items():
            if name in self.parameters and (gradient := self.parameters[name].grad) is not None:
                gradient.mul_(mask)
        self._step_matrices(scale)
        for name in self.others:
            self._step_adam(name, scale)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _step_matrices(self, scale: float) -> None:
        """Muon with Nesterov momentum; matrices of one shape are made orthogonal together."""
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name in self.matrices:
            by_shape[self.parameters[name].shape].append(name)
        rate = self.rates.matrices * scale
        for size, names in by_shape.items():
            updates = torch.stack([self._nesterov(name) for name in names])
            updates = orthogonalize(updates).float() * max(1.0, size[0] / size[1]) ** 0.5
            for name, update in zip(names, updates, strict=True):
                parameter = self.parameters[name]
                if name in self.masks:
                    update = update * self.masks[name]
                else:
                    parameter.mul_(1.0 - rate * self.rates.weight_decay)
                parameter.sub_(update, alpha=rate)

    def _nesterov(self, name: str) -> Tensor:
        """Update the momentum of a matrix; return the look-ahead gradient."""
        gradient, buffer, beta = self.parameters[name].grad, self.momentum[name], self.rates.momentum
        assert gradient is not None
        buffer.lerp_(gradient, 1.0 - beta)
        return gradient.lerp(buffer, beta)

    def _step_adam(self, name: str, scale: float) -> None:
        """Adam without decay."""
        parameter, first, second = self.parameters[name], self.first[name], self.second[name]
        gradient = parameter.grad
        assert gradient is not None
        rate = self.rates.embedding if parameter.ndim == 2 else self.rates.norms
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.05)
        unbiased1 = 1.0 - 0.9**self.step_count
        unbiased2 = 1.0 - 0.95**self.step_count
        parameter.sub_(first / unbiased1 / ((second / unbiased2).sqrt() + 1e-10), alpha=rate * scale)

    def state_dict(self) -> dict[str, object]:
        """Everything that changes from step to step."""
        return {
            "step_count": self.step_count,
            "momentum": self.momentum,
            "first": self.first,
            "second": self.second,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a saved state."""
        self.step_count = state["step_count"]
        for mine, saved in ((self.momentum, "momentum"), (self.first, "first"), (self.second, "second")):
            for name, buffer in state[saved].items():
                mine[name].copy_(buffer)
