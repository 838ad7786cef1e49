"""What training any objective has in common: its weights, its precision, its workers, its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from for_ray.errors import ForRayError
from for_ray.model.objectives import num_workers


class HaltedError(ForRayError):
    """The training cannot go on; all workers find it in the same step, so that none waits for another."""


def halt_together(problem: str | None, device: torch.device) -> None:
    """Halt all workers where one cannot go on: the others would wait for it. All call it at the same time.

    Args:
        problem: Why this worker cannot; None: it can.
        device: This worker's.

    Raises:
        HaltedError: One of them cannot.
    """
    num_halted = torch.tensor([float(problem is not None)], device=device)
    if num_workers() > 1:
        distributed.all_reduce(num_halted)
    if num_halted.item():
        raise HaltedError(problem or "another worker cannot go on")


class Trainer:
    """An objective that learns; where a process group exists, together with the other workers.

    Who inherits makes the optimizer and takes the steps.

    Args:
        objective: On its device.
        dtype: Of the computation: float32, or a lower one by autocast, float16 with scaled gradients.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, objective: nn.Module, *, dtype: torch.dtype) -> None:
        self.trained = {name: each for name, each in objective.named_parameters() if each.requires_grad}
        self.device = next(iter(self.trained.values())).device
        self._dtype = dtype
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        # What is frozen lies in buffers: broadcasting them would send it to every worker at every step.
        self._model: nn.Module = (
            DistributedDataParallel(objective, broadcast_buffers=False) if num_workers() > 1 else objective
        )

    def _autocast(self) -> torch.autocast:
        is_lower = self._dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self._dtype if is_lower else None, enabled=is_lower)

    def check(self, epoch: int) -> None:
        """Refuse weights that are not finite; all workers hold the same.

        Raises:
            HaltedError: Some are not.
        """
        for name, value in self.trained.items():
            if not value.isfinite().all():
                raise HaltedError(f"epoch {epoch + 1}: {name} is not finite any more; take a lower --lr")

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the weights and the optimizer, by reference."""
        return {
            "trained": {name: value.detach() for name, value in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: It is that of another model.
        """
        if set(state["trained"]) != set(self.trained):
            raise ValueError("the checkpoint is that of a model with other trained weights")
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
