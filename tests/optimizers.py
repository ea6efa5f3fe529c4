"""Optimizers that PyTorch does not have, as their papers and authors write them.

Their memory lies in ``state[parameter]``, in a state or a list of a wrapper's own, or in one vector.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.optim import Optimizer


class _Simple(Optimizer):
    """An optimizer of one update per parameter: ``update(p, g, state, group)``."""

    def __init__(self, params, lr=0.01, **settings):
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad + group.get("weight_decay", 0) * p, self.state[p], group)
        return loss


class ScheduleFreeSGD(Optimizer):
    """Defazio et al. 2024: the weights are y in train mode and x in eval mode; z is a copy of their size."""

    def __init__(self, params, lr=0.1, beta=0.9, weight_decay=0.0):
        super().__init__(
            params, {"lr": lr, "beta": beta, "k": 0, "weight_decay": weight_decay, "train": True}
        )

    def _swap(self, training):
        for group in self.param_groups:
            if group["train"] is not training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                        p.data.lerp_(self.state[p]["z"], weight)
                group["train"] = training

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            group["k"] += 1
            c = 1 / group["k"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                g = p.grad + group["weight_decay"] * p
                p.lerp_(z, c)
                p.add_(g, alpha=group["lr"] * (group["beta"] * (1 - c) - 1))
                z.sub_(g, alpha=group["lr"])


class MADGRAD(_Simple):
    """Defazio & Jelassi 2021: the weights are computed from x0, where training began."""

    def update(self, p, g, state, group):
        if not state:
            state.update(k=0, grad_sum_sq=torch.zeros_like(p), s=torch.zeros_like(p), x0=p.detach().clone())
        rate = (group["lr"] + 1e-12) * (state["k"] + 1) ** 0.5
        state["k"] += 1
        state["grad_sum_sq"].addcmul_(g, g, value=rate)
        state["s"].add_(g, alpha=rate)
        z = state["x0"].addcdiv(state["s"], state["grad_sum_sq"].pow(1 / 3).add_(1e-6), value=-1)
        p.lerp_(z, 0.1)


class Lion(_Simple):
    """Chen et al. 2023: the sign of a momentum."""

    def update(self, p, g, state, group):
        m = state.setdefault("exp_avg", torch.zeros_like(p))
        p.add_(m.lerp(g, 0.1).sign(), alpha=-group["lr"])
        m.lerp_(g, 0.01)


class AdaBelief(_Simple):
    """Zhuang et al. 2020: magnitudes under a name that PyTorch does not use."""

    def update(self, p, g, state, group):
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), surprise=torch.zeros_like(p))
        state["step"] += 1
        state["mean"].lerp_(g, 0.1)
        state["surprise"].lerp_((g - state["mean"]).square() + 1e-16, 0.001)
        first, second = 1 - 0.9 ** state["step"], 1 - 0.999 ** state["step"]
        p.addcdiv_(state["mean"] / first, (state["surprise"] / second).sqrt() + 1e-8, value=-group["lr"])


class Adan(_Simple):
    """Xie et al. 2022: three moments and the last gradient."""

    def update(self, p, g, state, group):
        if not state:
            state.update({k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_diff", "exp_avg_sq")})
            state["neg_pre_grad"] = -g
        change = g + state["neg_pre_grad"]
        state["exp_avg"].lerp_(g, 0.02)
        state["exp_avg_diff"].lerp_(change, 0.08)
        state["exp_avg_sq"].lerp_((g + 0.92 * change).square(), 0.01)
        move = state["exp_avg"] + 0.92 * state["exp_avg_diff"]
        p.addcdiv_(move, state["exp_avg_sq"].sqrt() + 1e-8, value=-group["lr"])
        state["neg_pre_grad"] = -g


class Prodigy(Optimizer):
    """Mishchenko & Defazio 2023: the distance from p0, where training began, sets the step."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr, "d": 1e-6, "numerator": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            denominator, d = 0.0, group["d"]
            group["numerator"] *= 0.9995
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update({k: torch.zeros_like(p) for k in ("s", "exp_avg", "exp_avg_sq")})
                    state["p0"] = p.detach().clone()
                group["numerator"] += d / 1e-6 * d * float((p.grad * (state["p0"] - p)).sum())
                state["exp_avg"].mul_(0.9).add_(p.grad, alpha=d * 0.1)
                state["exp_avg_sq"].mul_(0.999).addcmul_(p.grad, p.grad, value=d * d * 0.001)
                state["s"].mul_(0.9995).add_(p.grad, alpha=d / 1e-6 * d)
                denominator += float(state["s"].abs().sum())
            group["d"] = max(d, group["numerator"] / denominator) if denominator else d
            for p in group["params"]:
                state = self.state[p]
                p.addcdiv_(
                    state["exp_avg"], state["exp_avg_sq"].sqrt() + d * 1e-8, value=-group["d"] * group["lr"]
                )


class Orthogonal(_Simple):
    """Muon for convolutions too: the momentum of a whole weight, as a matrix, is made orthogonal."""

    def update(self, p, g, state, group):
        m = state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(0.95).add_(g)
        if p.dim() > 1:
            matrix = m.flatten(1)
            matrix = matrix / (matrix.norm() + 1e-7)
            for _ in range(5):
                square = matrix @ matrix.T
                matrix = 3.4445 * matrix + (-4.775 * square + 2.0315 * square @ square) @ matrix
            m = matrix.view_as(p)
        p.add_(m, alpha=-group["lr"])


class Pooled(_Simple):
    """Momentum of all parameters in one vector, which belongs to none of them."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        params = [p for group in self.param_groups for p in group["params"]]
        flat = torch.cat([p.grad.flatten() for p in params])
        if "all" not in self.state:
            self.state["all"] = {"momentum": torch.zeros_like(flat)}
        self.state["all"]["momentum"].mul_(0.9).add_(flat)
        pieces = self.state["all"]["momentum"].split([p.numel() for p in params])
        for p, piece in zip(params, pieces, strict=True):
            p.sub_(piece.view_as(p), alpha=self.param_groups[0]["lr"])


class SAM(Optimizer):
    """Foret et al. 2021, as in davda54/sam: the wrapper's own ``step`` need not be called."""

    def __init__(self, params, base, rho=0.05, **settings):
        super().__init__(params, {"rho": rho, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (torch.stack(grads).norm() + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "old_p" in self.state[p]:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure=None):
        closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class SAMInTwoSteps(SAM):
    """SAM of which ``step`` is never called."""

    def two_steps(self, closure):
        closure()
        self.first_step()
        closure()
        self.second_step()


class Lookahead(Optimizer):
    """Zhang et al. 2019, as most write it: no ``super().__init__()``, slow weights in a state of its own."""

    def __init__(self, inner, alpha=0.5, k=3):
        self.optimizer, self.alpha, self.k, self.count = inner, alpha, k, 0
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.state = defaultdict(dict)

    def slow_of(self, _place, _number, p):
        return self.state[p].setdefault("slow", p.detach().clone())

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for place, group in enumerate(self.param_groups):
                for number, p in enumerate(group["params"]):
                    slow = self.slow_of(place, number, p)
                    slow.lerp_(p, self.alpha)
                    p.data.copy_(slow)
        return loss


class LookaheadInLists(Lookahead):
    """Slow weights in lists beside those of the parameters, and hooks that nobody runs."""

    def __init__(self, inner, **settings):
        super().__init__(inner, **settings)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in inner.param_groups]
        del self.state

    def slow_of(self, place, number, _p):
        return self.slow_weights[place][number]


class LookaheadInside(Lookahead):
    """Slow weights in the state of the optimizer inside, made when they are first needed, as timm does."""

    def __init__(self, inner, **settings):
        super().__init__(inner, **settings)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    def slow_of(self, _place, _number, p):
        return self.optimizer.state[p].setdefault("lookahead_slow_buff", p.detach().clone())


class Together(Optimizer):
    """Several optimizers that step as one."""

    def __init__(self, *inner):
        self.inner = list(inner)
        self.state = {}

    @property
    def param_groups(self):
        return [group for one in self.inner for group in one.param_groups]

    def zero_grad(self, set_to_none=True):
        for one in self.inner:
            one.zero_grad(set_to_none)

    def step(self, closure=None):
        closure()
        for one in self.inner:
            one.step()
