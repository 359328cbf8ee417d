"""The learning-rate schedule and AdamW with float32 masters."""

import math

import torch
from torch import Tensor, nn

SCHEDULES = ("cosine", "linear", "constant")


def lr_at(step: int, total: int, peak: float, schedule: str = "cosine", warmup: float = 0) -> float:
    """The learning rate of step `step` (0, 1, …) of `total`: linear warm-up from 0, then the schedule to 0.

    warmup: steps if 1 or more, a share of all steps if below 1 (rounded up). Step for step that of transformers'
    get_*_schedule_with_warmup. Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown; choose from {', '.join(SCHEDULES)}")
    warmup = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (1 - progress) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW:
    """AdamW (arXiv 1711.05101) over what requires a gradient in `model`.

    Weights below float32 get a float32 master that takes the updates: a bf16 weight has 8 bits, and would round most
    of them away. Weight decay spares vectors (the norms).
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for p in model.parameters() if p.requires_grad]
        if not self.weights:
            raise ValueError("nothing to train: no parameter requires a gradient; attach LoRA or train in full")
        exact = torch.float32
        self.masters = [p if p.dtype == exact else p.detach().to(exact).requires_grad_() for p in self.weights]
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps)

    def collect(self) -> None:
        """After each backward: add the gradients of weights below float32 to their masters', and clear them.

        Left to add up in bf16, those of many micro-batches would lose what is small beside the sum.
        """
        for weight, master in zip(self.weights, self.masters):
            if master is not weight and weight.grad is not None:
                grad = weight.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                weight.grad = None

    def step(self, lr: float, max_norm: float) -> Tensor:
        """Clip the gradients to a total norm of max_norm (0: not), update, clear them; their norm before clipping."""
        self.collect()
        norm = nn.utils.clip_grad_norm_(self.masters, max_norm or math.inf)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters):
                if master is not weight:
                    weight.copy_(master)
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on: each weight in float32, and AdamW's moments and count of its steps."""
        found = {}
        for name, master in zip(self.names, self.masters):
            found[f"weight.{name}"] = master.detach()
            found |= {f"{key}.{name}": value for key, value in self.adamw.state[master].items()}
        return found

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what state() gave. Raises KeyError or RuntimeError for the state of other weights."""
        for name, weight, master in zip(self.names, self.weights, self.masters):
            master.copy_(tensors[f"weight.{name}"])
            if master is not weight:
                weight.copy_(master)
            for key in ("exp_avg", "exp_avg_sq"):
                moment = torch.empty_like(master)
                self.adamw.state[master][key] = moment.copy_(tensors[f"{key}.{name}"])
            self.adamw.state[master]["step"] = tensors[f"step.{name}"].clone()
