"""Settings of OPD that are known to be zero or wrong, found before anything starts."""

from opd_trainer.divergence.config import DivergenceKind
from opd_trainer.errors import Problem
from opd_trainer.opd.config import OpdApply, OpdConfig, ScheduleKind, TokenWeights


def opd_problems(opd: OpdConfig, *, estimator_whitens: bool, estimator_has_returns: bool) -> list[Problem]:
    """What is wrong with where and how the OPD term enters."""
    found = [*_strength(opd), *_shape(opd), *_divergence(opd)]
    if not opd.on:
        return found
    before = opd.apply is OpdApply.before_normalization
    if before and not estimator_whitens:
        found.append(
            Problem(
                "opd.apply",
                "before_normalization with an estimator that does not whiten",
                "there is no normalisation to come before, and the term would cost a scoring pass for nothing",
                "Set opd.apply=after_normalization, or estimator.whiten=true.",
            )
        )
    if opd.in_returns and not estimator_has_returns:
        found.append(
            Problem(
                "opd.in_returns",
                "true with an estimator without returns",
                "only ppo and reinforce_plus_plus accumulate the rewards of single tokens",
                "Set opd.in_returns=false, or estimator=reinforce_plus_plus.",
            )
        )
    if opd.in_returns and estimator_whitens and not before:
        found.append(
            Problem(
                "opd.in_returns",
                "true with an estimator that whitens",
                "whitening would subtract the mean reverse KL and make opd.kl_coef scale-free",
                "Set estimator.whiten=false, or opd.apply=before_normalization to ask for exactly that.",
            )
        )
    return found


def _divergence(opd: OpdConfig) -> list[Problem]:
    """A divergence as a loss takes the place of the term in the advantage, with all that belongs to it."""
    options = opd.divergence
    if not options.dense or not opd.on:
        return []
    found = []
    if options.kind is DivergenceKind.jsd and not 0 <= options.beta <= 1:
        found.append(
            Problem(
                "opd.divergence.beta", f"{options.beta}", "it is a share of a mixture", "Set opd.divergence.beta=0.5."
            )
        )
    if options.top_k < 1:
        found.append(
            Problem(
                "opd.divergence.top_k",
                f"{options.top_k}",
                "without candidates nothing is compared",
                "Set opd.divergence.top_k=64.",
            )
        )
    defaults = OpdConfig()
    for name in ("apply", "in_returns", "student_log_prob", "clip", "trust_alpha"):
        value = getattr(opd, name)
        if value != getattr(defaults, name):
            found.append(
                Problem(
                    f"opd.{name}",
                    f"{value} with opd.divergence.kind={options.kind}",
                    "it shapes the term in the advantage, which the divergence replaces",
                    f"Drop opd.{name}, or set opd.divergence.kind=sampled.",
                )
            )
    if opd.weights.kind is not TokenWeights.uniform:
        found.append(
            Problem(
                "opd.weights.kind",
                f"{opd.weights.kind} with opd.divergence.kind={options.kind}",
                "they weigh the term in the advantage, which the divergence replaces",
                "Set opd.weights.kind=uniform, or opd.divergence.kind=sampled.",
            )
        )
    return found


def _strength(opd: OpdConfig) -> list[Problem]:
    found = []
    schedule = opd.schedule
    if schedule.kind is ScheduleKind.target_kl and (schedule.target <= 0 or schedule.horizon < 1 or opd.kl_coef == 0):
        found.append(
            Problem(
                "opd.schedule.kind",
                f"target_kl with target {schedule.target}, horizon {schedule.horizon}, opd.kl_coef {opd.kl_coef}",
                "the controller multiplies a positive coefficient by a relative error over a number of steps",
                "Set opd.kl_coef=1 opd.schedule.target=0.05 opd.schedule.horizon=10.",
            )
        )
    decays = schedule.kind in (ScheduleKind.linear, ScheduleKind.cosine)
    if decays and (schedule.final < 0 or (schedule.steps is not None and schedule.steps < 1)):
        found.append(
            Problem(
                "opd.schedule",
                f"final {schedule.final}, steps {schedule.steps}",
                "a coefficient is not negative, and takes at least one step to change",
                "Set opd.schedule.final=0 opd.schedule.steps=null.",
            )
        )
    return found


def _shape(opd: OpdConfig) -> list[Problem]:
    found = []
    if opd.clip is not None and opd.clip <= 0:
        found.append(
            Problem(
                "opd.clip",
                f"{opd.clip}",
                "it bounds the size of each token's term, of which nothing would be left",
                "Set opd.clip=10, or null not to clip.",
            )
        )
    if not 0 < opd.trust_alpha <= 1:
        found.append(
            Problem(
                "opd.trust_alpha",
                f"{opd.trust_alpha}",
                "it is the teacher's share of the target; 0 leaves no teacher",
                "Set opd.trust_alpha=1 for the plain teacher.",
            )
        )
    weights = opd.weights
    if weights.kind is TokenWeights.first_fraction and not 0 < weights.fraction <= 1:
        found.append(
            Problem(
                "opd.weights.fraction",
                f"{weights.fraction}",
                "it is the share of each response that keeps the term",
                "Set opd.weights.fraction=0.3.",
            )
        )
    if weights.kind is TokenWeights.importance and weights.gamma < 0:
        found.append(
            Problem(
                "opd.weights.gamma",
                f"{weights.gamma}",
                "late tokens would count more than early ones, and may get a negative weight",
                "Set opd.weights.gamma=1.",
            )
        )
    if opd.log_prob_top_k < 0:
        found.append(
            Problem("opd.log_prob_top_k", f"{opd.log_prob_top_k}", "it is a count", "Set opd.log_prob_top_k=0.")
        )
    return found
