"""What processes of tests would each import for seconds: the fork server imports it once for all of them."""

import torch

import opd_trainer.megatron.learner
import opd_trainer.megatron.worker  # noqa: F401

# Test processes share few cores, and one thread makes sums reproducible.
torch.set_num_threads(1)
