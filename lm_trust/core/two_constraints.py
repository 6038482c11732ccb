"""The step that is best under two constraints at once: a trust region and a linear bound on a cost.

Constrained policy optimisation (Achiam et al. 2017, section 6 and appendix 10.2) maximises g'x subject to
c + b'x <= 0 and x'Hx / 2 <= max_kl. The optimum is (H^-1 g - nu H^-1 b) / lambda, so it lies in the plane of two
directions, v = H^-1 g and w = H^-1 b, and everything there is to know of the problem is a few scalars.

Here v and w may be inexact (few iterations of conjugate gradient, damping), so the slopes along them and the curvatures
between them are given apart: whatever v and w are, the step keeps the linear bound and the quadratic one exactly. With
exact solves it is the closed form of the paper: g'v = v'Hv = q, g'w = b'v = v'Hw = r, b'w = w'Hw = s, and then
lambda = 1 / along_v = sqrt((q - r^2 / s) / (2 max_kl - c^2 / s)) and nu = -along_w / along_v = (lambda c + r) / s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Case = Literal["inactive", "active", "recovery"]

_PARALLEL = 1e-6  # squared sine, in the metric of H, below which the difference of two directions is rounding


@dataclass(frozen=True)
class TwoConstraintStep:
    """x = along_v * v + along_w * w.

    Attributes:
        along_v, along_w: the multiples of the two directions.
        case: "inactive", the plain trust-region step keeps the bound on the cost; "active", both constraints bind;
            "recovery", no step of the trust region keeps the bound, and x lowers the cost as far as it can.
    """

    along_v: float
    along_w: float
    case: Case


def two_constraint_step(
    *, gv: float, gw: float, bv: float, bw: float, vHv: float, vHw: float, wHw: float, slack: float, max_kl: float
) -> TwoConstraintStep:
    """The multiples of v and w in the step that maximises g'x with slack + b'x <= 0 and x'Hx / 2 <= max_kl.

    Args:
        gv, gw: slopes of the objective along the two directions.
        bv, bw: slopes of the cost.
        vHv, vHw, wHw: curvatures, undamped; vHv > 0.
        slack: c, the cost's excess over its bound before the step.
        max_kl: of the trust region, nats per step.
    """
    plain = math.sqrt(2 * max_kl / vHv)
    # Without a slope of the cost there is nothing to trade the objective for.
    if slack + plain * bv <= 0 or not (bw > 0 and wHw > 0):
        return TwoConstraintStep(plain, 0.0, "inactive")
    # On the edge of the bound x = back w + across u, where u = v - (b'v / b'w) w leaves the cost as it is.
    share, back = bv / bw, -slack / bw
    uHu, uHw, gu = vHv - 2 * share * vHw + share**2 * wHw, vHw - share * wHw, gv - share * gw
    if uHu <= _PARALLEL * vHv:
        across, feasible = 0.0, back**2 * wHw <= 2 * max_kl
    else:
        middle = back * uHw
        rest = middle**2 + uHu * (2 * max_kl - back**2 * wHw)
        feasible = rest >= 0
        across = (math.copysign(math.sqrt(max(rest, 0.0)), gu) - middle) / uHu
    if not feasible:
        return TwoConstraintStep(0.0, -math.sqrt(2 * max_kl / wHw), "recovery")
    return TwoConstraintStep(across, back - across * share, "active")
