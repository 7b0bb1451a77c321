"""Clip the gradient of each example before they are summed; `gradclip_jax.per_example` names it.

`rule.py` says what is done with an example. `call.py` is the public call: it splits modules
(`modules.py`), goes through the batch (`microbatches.py`, `users.py`), where `ghost.py` keeps
gradients as factors, and asks `sharding.py` for mesh axes. `clip.py` serves gradients that exist
already, and `noise.py` private training.
"""
