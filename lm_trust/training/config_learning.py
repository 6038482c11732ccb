"""The parts of a configuration that say how a run learns: advantage estimators, critics, update rules.

Each is one frozen pydantic model, told apart by its `kind`; both worlds' configurations are put together from them in
`lm_trust.training.config`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

GROUPED = ("leave_one_out", "group_relative")  # estimators whose baseline is the other samples of a prompt


def _whole(value: Any) -> Any:
    """1e6 is a float in YAML, and what people write for a number of steps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    """peft takes one name, or its word for all linear layers, without a list."""
    return [value] if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[Whole, Field(gt=0, le=10**12)]  # beyond it a count is a slip, and would overflow
Count = Annotated[Whole, Field(ge=0, le=10**12)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Targets = Annotated[list[Name], Field(min_length=1), BeforeValidator(_listed)]
Seed = Annotated[Whole, Field(ge=0, le=2**32 - 1)]


def default_kind(kind: str) -> BeforeValidator:
    """Lets a section without a `kind`, or each item of a list of them, be of this one."""

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {"kind": kind, **value} if isinstance(value, dict) else value

    return BeforeValidator(fill)


class Section(BaseModel):
    """A mapping of the config: unknown keys and silently converted types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


MINIBATCHES = Field(4, description="parts that a pass is cut into; fewer by default where 4 do not divide the rows")


def with_default_minibatches(section: Any, rows: int) -> Any:
    """A critic's or a rule's section whose number of minibatches, where it was not given, divides so many rows."""
    default = getattr(section, "minibatches", None)
    if default is None or "minibatches" in section.model_fields_set:
        return section
    return section.model_copy(update={"minibatches": max(n for n in range(1, default + 1) if rows % n == 0)})


# ---- advantage estimators


class Gae(Section):
    """Generalised advantage estimation."""

    kind: Literal["gae"] = "gae"
    gamma: Fraction = Field(0.99, description="discount a step; 1.0 is usual for language")
    lam: Fraction = Field(0.95, description="decay of the trace: 0 one-step, 1 Monte Carlo")
    whiten: bool = Field(True, description="shift and scale a batch's advantages to mean 0, sd 1")


class ReturnsToGo(Section):
    """Discounted returns to go, less the critic's value.

    The critic's value stands for what a rollout's end or a time limit cuts off; without a critic they count as ends.
    """

    kind: Literal["returns_to_go"] = "returns_to_go"
    gamma: Fraction = Field(0.99, description="discount a step; 1.0 is usual for language")
    whiten: bool = Field(True, description="shift and scale a batch's advantages to mean 0, sd 1")


class LeaveOneOut(Section):
    """A completion's score less the mean of the other completions of its prompt (RLOO)."""

    kind: Literal["leave_one_out"] = "leave_one_out"
    whiten: bool = Field(True, description="shift and scale a batch's advantages to mean 0, sd 1")


class GroupRelative(Section):
    """A completion's score less the mean of all completions of its prompt (GRPO; without `scale` Dr. GRPO)."""

    kind: Literal["group_relative"] = "group_relative"
    scale: bool = Field(True, description="divide by the standard deviation within the prompt")
    whiten: bool = Field(False, description="shift and scale a batch's advantages to mean 0, sd 1")


# ---- critics


class NoCritic(Section):
    """No value function."""

    kind: Literal["none"] = "none"


class Mlp(Section):
    """A network of its own on the observations."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[PositiveInt] = Field([64, 64], description="widths of the hidden layers")
    learning_rate: PositiveFloat = Field(1e-3, description="Adam's step size")
    epochs: PositiveInt = Field(10, description="passes over an iteration's experience")
    minibatches: PositiveInt = MINIBATCHES
    clip: PositiveFloat | None = Field(None, description="how far a value may move before its loss is clipped")
    anneal: bool = Field(False, description="let the learning rate fall to 0 over the run")
    own_process: bool = Field(
        False, description="fit it on another core while the policy is updated, where the run is one process"
    )


class ReferenceHead(Section):
    """A value head on the frozen reference model's hidden states: it cannot move the policy."""

    kind: Literal["reference_head"] = "reference_head"
    hidden: list[PositiveInt] = Field([256], description="widths of the head's hidden layers")
    learning_rate: PositiveFloat = Field(1e-3, description="AdamW's step size")
    epochs: PositiveInt = Field(4, description="passes over an iteration's experience")
    minibatches: PositiveInt = MINIBATCHES
    clip: PositiveFloat | None = Field(None, description="how far a value may move before its loss is clipped")
    anneal: bool = Field(False, description="let the learning rate fall to 0 over the run")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")


class AdapterHead(Section):
    """A value head on the base model with a second LoRA adapter, trained with it; the policy's own stays as it is."""

    kind: Literal["adapter"] = "adapter"
    r: PositiveInt = Field(8, description="rank of the critic's adapter")
    alpha: PositiveInt = Field(16, description="the adapter is scaled by alpha / r")
    targets: Targets | None = Field(
        None, description="modules to adapt, or all-linear: all but the output head; null: chosen by architecture"
    )
    learning_rate: PositiveFloat = Field(3e-4, description="AdamW's step size")
    epochs: PositiveInt = Field(2, description="passes over an iteration's experience")
    minibatches: PositiveInt = MINIBATCHES
    clip: PositiveFloat | None = Field(None, description="how far a value may move before its loss is clipped")
    anneal: bool = Field(False, description="let the learning rate fall to 0 over the run")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")


class ModelHead(AdapterHead):
    """A value head on a model of its own, with a LoRA adapter, trained with it."""

    kind: Literal["model"] = "model"
    path: Name | None = Field(
        None, description="a folder or hub id of the same tokenizer; null: model.path at model.revision"
    )
    revision: Name | None = Field(None, description="revision of a hub id in critic.path")


# ---- update rules


class Trpo(Section):
    """Natural gradient step on the bound of the step KL, with a line search on the exact KL."""

    kind: Literal["trpo"] = "trpo"
    max_kl: PositiveFloat = Field(0.01, description="bound on the mean step KL, nats a token or step")
    anneal: bool = Field(False, description="let the bound fall to 0 over the run")
    damping: float = Field(0.1, ge=0, description="multiple of the identity added to the Fisher matrix")
    cg_iterations: PositiveInt = Field(10, description="most conjugate gradient iterations")
    preconditioner: Literal["gradient"] | None = Field(
        None, description="gradient: made from the gradient, for fewer iterations; null: none"
    )
    fisher_fraction: float = Field(1.0, gt=0, le=1, description="share of the rows the Fisher is taken on")
    fisher_method: Literal["auto", "gauss_newton", "kl_hessian", "finite_difference"] = Field(
        "auto", description="how its products are computed"
    )
    backtrack_ratio: float = Field(0.8, gt=0, lt=1, description="factor on the step at each backtrack")
    max_backtracks: Count = Field(10, description="backtracks before the step is rejected")
    accept_ratio: Fraction = Field(0.0, description="least share of the predicted gain to accept a step")
    holdout_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the rows that judge a step and have no part in its direction"
    )


class AdamUpdate(Section):
    """What the rules of several epochs of Adam share."""

    kind: str
    epochs: PositiveInt = Field(4, description="passes over an iteration's experience")
    minibatches: PositiveInt = MINIBATCHES
    learning_rate: PositiveFloat = Field(3e-4, description="Adam's step size")
    anneal: bool = Field(False, description="let the learning rate fall to 0 over the run")
    entropy: float = Field(0.0, ge=0, description="coefficient of the entropy bonus")
    max_grad_norm: PositiveFloat | None = Field(0.5, description="gradients are clipped to this norm; null: never")


class PpoClip(AdamUpdate):
    """Clipped surrogate, several epochs of Adam a batch (PPO)."""

    kind: Literal["ppo_clip"] = "ppo_clip"
    clip: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped at 1 - clip ...")
    clip_high: PositiveFloat | None = Field(None, description="... and at 1 + clip_high; null: as clip")
    anneal_entropy: bool = Field(False, description="let the entropy bonus fall to 0 over the run")
    target_kl: PositiveFloat | None = Field(
        None,
        description="step KL: the epochs end where a minibatch's k3 estimate is over 1.5 times it; null: never",
    )


class PpoPenalty(AdamUpdate):
    """The surrogate less an adaptive multiple of the step KL, several epochs of Adam a batch (PPO)."""

    kind: Literal["ppo_penalty"] = "ppo_penalty"
    target_kl: PositiveFloat = Field(0.01, description="step KL that the multiple is steered to, nats a token or step")
    beta: PositiveFloat = Field(1.0, description="the multiple at first")


class PpoTrust(PpoClip):
    """PPO's epochs with the clipped surrogate, then the whole move scaled back into a bound on the step KL."""

    kind: Literal["ppo_trust"] = "ppo_trust"
    max_kl: PositiveFloat = Field(0.015, description="bound on the mean step KL, nats a token or step")


class NaturalGradient(Section):
    """Natural gradient step of a fixed size, without bound and line search."""

    kind: Literal["natural_gradient"] = "natural_gradient"
    step_size: PositiveFloat = Field(0.1, description="multiple of the natural gradient")
    anneal: bool = Field(False, description="let the step size fall to 0 over the run")
    damping: float = Field(0.1, ge=0, description="multiple of the identity added to the Fisher matrix")
    cg_iterations: PositiveInt = Field(10, description="most conjugate gradient iterations")
    fisher_fraction: float = Field(1.0, gt=0, le=1, description="share of the rows the Fisher is taken on")
    fisher_method: Literal["auto", "gauss_newton", "kl_hessian", "finite_difference"] = Field(
        "auto", description="how its products are computed"
    )


class Reinforce(Section):
    """One step of Adam along the policy gradient."""

    kind: Literal["reinforce"] = "reinforce"
    learning_rate: PositiveFloat = Field(3e-3, description="Adam's step size")
    anneal: bool = Field(False, description="let the learning rate fall to 0 over the run")
    entropy: float = Field(0.0, ge=0, description="coefficient of the entropy bonus")
    max_grad_norm: PositiveFloat | None = Field(0.5, description="gradients are clipped to this norm; null: never")


class TrpoPenalty(AdamUpdate):
    """The surrogate less a multiple of the largest step KL: TRPO's lower bound on the return, by epochs of Adam."""

    kind: Literal["trpo_penalty"] = "trpo_penalty"
    coefficient: PositiveFloat | None = Field(
        1.0, description="the multiple; null: that of the theory, from advantage.gamma"
    )


class Projection(AdamUpdate):
    """The surrogate of the policy projected into a trust region at each step, by epochs of Adam (TROLL)."""

    kind: Literal["projection"] = "projection"
    token_kl: PositiveFloat = Field(0.05, description="how far a projected distribution may be from the old one, nats")
    pull: float = Field(1.0, ge=0, description="weight of the KL from the policy to its projection")
    top_k: PositiveInt | None = Field(None, description="actions that are told apart; null: all")


class DivergenceMask(AdamUpdate):
    """PPO whose clip looks at the divergence of a step and not at its ratio (DPPO)."""

    kind: Literal["divergence_mask"] = "divergence_mask"
    divergence: Literal["kl", "tv"] = Field("kl", description="KL, or total variation (discrete actions)")
    threshold: PositiveFloat = Field(
        0.05, description="beyond it a step that would go on is left out; tv: 0.15 is usual"
    )
    top_k: PositiveInt | None = Field(None, description="actions that are told apart; null: all; 1: taken or not")


Update = Annotated[
    Trpo | PpoClip | PpoPenalty | PpoTrust | NaturalGradient | Reinforce | TrpoPenalty | Projection | DivergenceMask,
    Field(discriminator="kind"),
]
UPDATE = Field(default_factory=Trpo, description="how the policy moves")
