"""The mathematics that both worlds share. torch only: no gymnasium, no transformers, no files."""

from lm_trust.core.advantages import (
    gae,
    group_relative,
    leave_one_out,
    masked_mean,
    masked_whiten,
    returns_to_go,
)
from lm_trust.core.batch import Batch, Rollout
from lm_trust.core.conjugate_gradient import ConjugateGradientResult, conjugate_gradient
from lm_trust.core.distributions import (
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    kl_estimators,
)
from lm_trust.core.fisher import FisherOperator
from lm_trust.core.report import StepReport
from lm_trust.core.surrogate import clipped_surrogate, clipped_value_loss
from lm_trust.core.trust_region import trust_region_step

__all__ = [
    "Batch",
    "Categorical",
    "ConjugateGradientResult",
    "DiagonalGaussian",
    "Distribution",
    "FisherOperator",
    "MultiCategorical",
    "Rollout",
    "StepReport",
    "clipped_surrogate",
    "clipped_value_loss",
    "conjugate_gradient",
    "gae",
    "group_relative",
    "kl_estimators",
    "leave_one_out",
    "masked_mean",
    "masked_whiten",
    "returns_to_go",
    "trust_region_step",
]
