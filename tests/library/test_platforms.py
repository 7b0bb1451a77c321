"""The reductions of TPU and GPU, which run on CPU, too, where leaves are small.

Each test is one of another file, in a program as these platforms have it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_devices
import test_floor_laws
import test_hard_cases
from jax.sharding import AxisType
from registry import tolerance
from test_devices import (
    test_devices_of_very_different_size_share_one_collective,
    test_devices_on_both_sides_of_a_bound_of_the_safe_range,
    test_mixed_memories_are_reduced_where_they_are,
    test_state_scans_inside_shard_map,
    test_the_norm_of_eight_devices_is_that_of_one,
)
from test_floor_laws import (
    test_a_mapped_update_is_the_one_of_each,
    test_clipped_norms_are_at_most_the_limit,
    test_complex_leaves_are_held_by_modulus,
    test_derivatives_are_finite_and_agree_with_forward_mode,
    test_finite_gradients_are_held_exactly_at_any_scale,
    test_norms_are_float64_under_x64,
    test_propagate_makes_the_group_nan_and_leaves_the_others_alone,
    test_the_derivative_at_zero_is_the_identity,
    test_updates_at_or_below_the_limit_are_bit_identical,
    test_what_is_not_finite_is_found_in_large_arrays,
    test_what_is_not_finite_zeroes_its_group_and_leaves_the_others_alone,
    test_zero_stays_zero,
)
from test_norms import (
    test_a_nan_in_an_imaginary_part_is_seen_in_a_large_array,
    test_a_norm_beyond_the_largest_float32_is_infinite,
    test_bfloat16_sums_do_not_stop_growing,
    test_elements_of_very_different_size,
    test_norms_agree_with_float64_at_any_scale,
    test_squares_near_the_smallest_float32_are_not_lost,
)
from test_recurrences import test_norms_grow_array_by_array

from gradclip_jax import global_norm

__all__ = [
    "test_a_mapped_update_is_the_one_of_each",
    "test_a_nan_in_an_imaginary_part_is_seen_in_a_large_array",
    "test_a_norm_beyond_the_largest_float32_is_infinite",
    "test_bfloat16_sums_do_not_stop_growing",
    "test_clipped_norms_are_at_most_the_limit",
    "test_complex_leaves_are_held_by_modulus",
    "test_derivatives_are_finite_and_agree_with_forward_mode",
    "test_devices_of_very_different_size_share_one_collective",
    "test_devices_on_both_sides_of_a_bound_of_the_safe_range",
    "test_elements_of_very_different_size",
    "test_finite_gradients_are_held_exactly_at_any_scale",
    "test_mixed_memories_are_reduced_where_they_are",
    "test_norms_agree_with_float64_at_any_scale",
    "test_norms_are_float64_under_x64",
    "test_norms_grow_array_by_array",
    "test_propagate_makes_the_group_nan_and_leaves_the_others_alone",
    "test_squares_near_the_smallest_float32_are_not_lost",
    "test_state_scans_inside_shard_map",
    "test_the_derivative_at_zero_is_the_identity",
    "test_the_norm_of_eight_devices_is_that_of_one",
    "test_updates_at_or_below_the_limit_are_bit_identical",
    "test_what_is_not_finite_is_found_in_large_arrays",
    "test_what_is_not_finite_zeroes_its_group_and_leaves_the_others_alone",
    "test_zero_stays_zero",
]


@pytest.fixture(scope="module", autouse=True, params=["tpu", "cuda"])
def platform(request):
    """The platform for which programs are made: they are made anew for it, and after it."""

    def choose(*args, default, **ways):
        return ways.get(request.param, default)(*args)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", choose)
        # CPU adds what a reduction of three operands sums one after the other.
        patch.setattr(test_floor_laws, "tolerance", lambda tree: 2 * tolerance(tree))
        yield
    jax.clear_caches()


NAMES = ("clip_by_global_norm", "clip_by_norm", "clip_by_unit_norm", "clip_by_value")
SPLIT = [strategy for strategy in test_devices.MEASURED if str(strategy) in NAMES]
representatives = pytest.mark.parametrize("strategy", SPLIT, ids=str)


@representatives
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_jit_with_shardings(strategy, kind):
    test_devices.test_jit_with_shardings(strategy, kind)


@representatives
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_shard_map(strategy, check_vma, mesh_2d):
    test_devices.test_shard_map(strategy, check_vma, mesh_2d)


@representatives
def test_pmap_with_every_leaf_split_along_a_name(strategy):
    test_devices.test_pmap_with_every_leaf_split_along_a_name(strategy)


@representatives
def test_every_strategy_takes_mixed_memories(strategy):
    test_devices.test_every_strategy_takes_mixed_memories(strategy)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_experts_and_dense_leaves_share_one_norm_over_different_axes(check_vma):
    test_hard_cases.test_experts_and_dense_leaves_share_one_norm_over_different_axes(check_vma)


def test_large_leaves_of_one_device_are_summed_by_rows():
    """A leaf of that size alone takes two kernels, and the second one is shared."""
    tree = {"a": 3 * jnp.ones((160, 128)), "b": jnp.full((4, 64, 128), 4e25), "c": jnp.ones(7)}
    norm = global_norm(tree)
    assert float(norm) == pytest.approx(4e25 * np.sqrt(4 * 64 * 128), rel=1e-5)
    tree["b"] = jnp.full((4, 64, 128), 1e-25)
    assert float(global_norm(tree)) == pytest.approx(np.sqrt(9 * 160 * 128 + 7), rel=1e-5)
