"""The two-constraint step against a general solver, and against what it promises for inexact directions."""

import numpy as np
import pytest
from scipy.optimize import minimize

from lm_trust.core.two_constraints import two_constraint_step

P, MAX_KL = 6, 0.02


def problem(seed):
    """g, b and a positive definite H of some condition."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(P, P)) * np.geomspace(0.3, 3.0, P)
    return random.normal(size=P), random.normal(size=P), root @ root.T + 0.05 * np.eye(P)


def step(g, b, H, slack, v, w, max_kl=MAX_KL):
    found = two_constraint_step(
        gv=g @ v, gw=g @ w, bv=b @ v, bw=b @ w, vHv=v @ H @ v, vHw=v @ H @ w, wHw=w @ H @ w, slack=slack, max_kl=max_kl
    )
    return found.along_v * v + found.along_w * w, found.case


def exact(g, b, H, slack, max_kl=MAX_KL):
    return step(g, b, H, slack, np.linalg.solve(H, g), np.linalg.solve(H, b), max_kl)


def solver(objective, H, constraints, max_kl=MAX_KL, kind="ineq"):
    """The minimum over the trust region, in coordinates where it is the unit ball, from several starts."""
    factor = np.linalg.cholesky(H / (2 * max_kl))
    back = np.linalg.inv(factor).T  # x = back @ y, x'Hx / 2 = max_kl |y|^2
    ball = {"type": "ineq", "fun": lambda y: 1 - y @ y, "jac": lambda y: -2 * y}
    mapped = [{"type": kind, "fun": lambda y, f=f: f(back @ y)} for f in constraints]
    best = None
    for seed in range(2):
        start = np.random.default_rng(seed).normal(size=len(H)) * 0.2
        found = minimize(
            lambda y: objective(back @ y),
            start,
            method="SLSQP",
            constraints=[ball, *mapped],
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        kept = all(f(back @ found.x) > -1e-9 for f in constraints) and found.x @ found.x < 1 + 1e-9
        if kept and (best is None or found.fun < best[0]):
            best = found.fun, back @ found.x
    return None if best is None else best[1]


def reach(b, H, max_kl=MAX_KL):
    """How far b'x goes in the trust region."""
    return np.sqrt(2 * max_kl * b @ np.linalg.solve(H, b))


# The slack as a share of the reach: far inside the bound, about on its edge on either side, and out of reach.
SLACKS = {"far within": -1.5, "within": -0.3, "on the edge": 0.0, "over": 0.4, "far over": 0.95, "out of reach": 1.3}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", SLACKS.values(), ids=SLACKS.keys())
def test_is_what_a_general_solver_finds(seed, share):
    g, b, H = problem(seed)
    slack = share * reach(b, H)
    x, case = exact(g, b, H, slack)
    if share > 1:
        assert case == "recovery"
        expected = solver(lambda x: b @ x, H, [])
    else:
        expected = solver(lambda x: -g @ x, H, [lambda x: -(slack + b @ x)])
        plain = np.linalg.solve(H, g) * np.sqrt(2 * MAX_KL / (g @ np.linalg.solve(H, g)))
        assert case == ("inactive" if slack + b @ plain <= 0 else "active")
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_every_case_is_among_the_problems_above():
    found = set()
    for seed in range(4):
        g, b, H = problem(seed)
        found |= {(exact(g, b, H, share * reach(b, H))[1], share > 0) for share in SLACKS.values()}
    assert found >= {("inactive", False), ("active", False), ("active", True), ("recovery", True)}


def test_is_the_closed_form_of_the_paper():
    """Achiam et al. 2017, appendix 10.2: x = (H^-1 g - nu H^-1 b) / lambda, with lambda where the dual is least."""
    for seed in range(8):
        g, b, H = problem(seed)
        v, w = np.linalg.solve(H, g), np.linalg.solve(H, b)
        q, r, s = g @ v, g @ w, b @ w
        c = 0.3 * reach(b, H)
        a, room = q - r**2 / s, 2 * MAX_KL - c**2 / s

        # For a maximised objective (the paper's q, r, s and c are the same; its r has the other sign).
        def dual(multiplier, a=a, room=room, q=q, r=r, s=s, c=c):
            if multiplier * c + r > 0:
                return 0.5 * (a / multiplier + multiplier * room) - r * c / s
            return 0.5 * (q / multiplier + 2 * MAX_KL * multiplier)

        candidates = [np.sqrt(a / room), np.sqrt(q / (2 * MAX_KL))]
        best = min(candidates, key=dual)
        nu = max(0.0, (best * c + r) / s)
        np.testing.assert_allclose(exact(g, b, H, c)[0], (v - nu * w) / best, rtol=1e-9)


def test_no_cost_gradient_is_the_plain_step_or_out_of_reach():
    g, b, H = problem(0)
    v = np.linalg.solve(H, g)
    plain = v * np.sqrt(2 * MAX_KL / (g @ v))
    x, case = step(g, 0 * b, H, 0.5, v, 0 * b)  # none at all: nothing to act on
    assert case == "inactive"
    np.testing.assert_allclose(x, plain, rtol=1e-12)
    for scale in (1e-6, 1e-30):
        x, case = exact(g, scale * b, H, -1e-3)
        assert case == "inactive"
        np.testing.assert_allclose(x, plain, rtol=1e-12)
        x, case = exact(g, scale * b, H, 1e-3)
        assert case == "recovery"
        np.testing.assert_allclose(x, solver(lambda x: b @ x, H, []), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-6])
def test_parallel_gradients(sign, noise):
    g, other, H = problem(1)
    b = 2.0 * sign * g + noise * other
    # A cost that grows with the objective: stop on the edge of the bound. One that falls with it: the plain step.
    x, case = exact(g, b, H, -0.5 * reach(b, H))
    assert case == ("active" if sign > 0 else "inactive")
    assert b @ x == pytest.approx((0.5 if sign > 0 else -1.0) * reach(b, H), rel=1e-5)
    assert 0.5 * x @ H @ x <= MAX_KL * (1 + 1e-6)
    x, case = exact(g, b, H, 0.5 * reach(b, H))
    assert case == ("active" if sign > 0 else "inactive")
    assert b @ x <= -0.5 * reach(b, H) * (1 - 1e-6)
    assert 0.5 * x @ H @ x <= MAX_KL * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_inexact_directions_still_keep_both_bounds_to_the_edge(seed):
    """Damped solves, as few iterations of conjugate gradient give them: slopes and curvatures no longer agree."""
    g, b, H = problem(seed)
    random = np.random.default_rng(100 + seed)
    damped = H + 0.5 * np.eye(P)
    v = np.linalg.solve(damped, g) + 0.02 * random.normal(size=P)
    w = np.linalg.solve(damped, b) + 0.02 * random.normal(size=P)
    assert b @ w > 0 and abs(v @ H @ v / (g @ v) - 1) > 0.02
    for share in (-0.4, 0.0, 0.4):
        slack = share * reach(b, H)
        x, case = step(g, b, H, slack, v, w)
        assert 0.5 * x @ H @ x == pytest.approx(MAX_KL, rel=1e-9)
        if case == "recovery":
            np.testing.assert_allclose(x, -w * np.sqrt(2 * MAX_KL / (w @ H @ w)))
            continue
        assert slack + b @ x <= 1e-9
        if case == "active":
            assert slack + b @ x == pytest.approx(0, abs=1e-9)
            # Of all that lies on the edge of the bound in the plane of v and w, the best.
            basis = np.stack([v, w], axis=1)
            gain, cost, curvature = g @ basis, b @ basis, basis.T @ H @ basis
            edge = [lambda y, cost=cost, slack=slack: slack + cost @ y]
            best = solver(lambda y, gain=gain: -gain @ y, curvature, edge, kind="eq")
            assert g @ x == pytest.approx(gain @ best, rel=1e-6, abs=1e-9)
