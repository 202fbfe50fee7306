"""Post-training: supervised, reinforcement learning, distillation, verifiers.

Objectives here are configurations with `build(model)`, which `train` optimises
as it does pretraining. What scores answers (verifiers, tasks) knows no model.
"""
