"""torch's own samples of its operators, each split every way that its axes allow: ``python -m op_samples``."""
