"""Recipes by name: options of `train.py` that were published, or that take minutes on a laptop."""

from typing import Any

# 0.3 with momentum 0.9 is a step of 3: with the limit of 5 the network learns at once, without it
# the first steps throw it to where it does not recover.
DEMO = {"learning_rate": 0.3, "momentum": 0.9, "max_norm": 5.0}
# Zaremba et al. 2014, section 4.1: plain SGD at rate 1, evaluated as one stream.
ZAREMBA = {
    "level": "word", "layers": 2, "forget_bias": 0.0, "batch": 20, "max_norm": 5.0,
    "learning_rate": 1.0, "momentum": 0.0, "eval_streams": 1,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "demo": DEMO | {"compare": True},
    "zaremba-small": ZAREMBA | {
        "units": 200, "unroll": 20, "init_scale": 0.1, "dropout": 0.0,
        "epochs": 13, "constant_epochs": 4, "epoch_divisor": 2.0,
    },
    "zaremba-medium": ZAREMBA | {
        "units": 650, "unroll": 35, "init_scale": 0.05, "dropout": 0.5,
        "epochs": 39, "constant_epochs": 6, "epoch_divisor": 1.2,
    },
    "zaremba-large": ZAREMBA | {
        "units": 1500, "unroll": 35, "init_scale": 0.04, "dropout": 0.65, "max_norm": 10.0,
        "epochs": 55, "constant_epochs": 14, "epoch_divisor": 1.15,
    },
    # For one text; that of Tiny Shakespeare (a million characters) takes minutes on two cores.
    "shakespeare": {
        "level": "char", "units": 256, "dropout": 0.1, "batch": 32, "unroll": 64, "epochs": 3,
        "optimizer": "adam", "learning_rate": 3e-3, "max_norm": 5.0,
    },
    "chatbot": {
        "dialogues": True, "level": "word", "cell": "gru", "units": 192, "batch": 32, "unroll": 64,
        "epochs": 6, "optimizer": "rmsprop", "learning_rate": 2e-3, "max_norm": 5.0,
    },
}  # fmt: skip
