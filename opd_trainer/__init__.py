"""opd_trainer: on-policy distillation with Megatron-core, one controller, any advantage estimator."""

__version__ = "0.1.0"
