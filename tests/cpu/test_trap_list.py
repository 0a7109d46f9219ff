"""Each known trap of attention kernels on Hopper, and the test that would see it.

From the errors of FlashAttention, cuDNN and CUTLASS that others have met and reported, and from
those that our prototypes ran into.
"""

import pathlib
import re

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

# trap -> tests, as FILE::NAME; a tool's file stands for itself.
TRAPS = {
    # Masks and rows.
    "fully masked rows: 0, lse -inf, no NaN": [
        "gpu/test_numerics.py::test_fully_masked_rows_give_zero_and_minus_infinity",
        "gpu/test_lazy.py::test_masked_blocks_that_begin_right_behind_a_rows_last_key",
    ],
    "the first block that is read is masked or -inf for some rows: -inf - -inf": [
        "gpu/test_numerics.py::test_a_score_of_minus_infinity_in_the_first_block_read",
        "gpu/test_lazy.py::test_masked_blocks_that_begin_right_behind_a_rows_last_key",
        "cuda/mask_test.cc",
    ],
    "T != S causal in both alignments; T = 1; S = 1; T > S": [
        "gpu/test_forward.py::test_every_length_beside_a_tile_edge",
        "gpu/test_configurations.py::test_both_sides_of_a_configurations_own_edges",
    ],
    "lengths beside a multiple of a tile, below 16, not a multiple of 8": [
        "gpu/test_forward.py::test_every_length_beside_a_tile_edge",
        "gpu/test_configurations.py::test_both_sides_of_a_configurations_own_edges",
    ],
    "NaN in memory behind the last key or query": [
        "gpu/test_numerics.py::test_neighbours_in_memory_are_never_read_into_a_result",
        "gpu/test_numerics.py::test_nan_in_masked_keys_and_values_of_other_tiles_changes_nothing",
    ],
    "NaN and infinities in the inputs; scores of 10000": [
        "gpu/test_numerics.py::test_nan_in_a_row_stays_in_that_row",
        "gpu/test_lazy.py::test_nan_in_a_query_costs_one_group",
        "gpu/test_lazy.py::test_infinities_in_a_key_cost_the_groups_that_they_reach",
        "gpu/test_lazy.py::test_scores_that_rise_along_the_keys",
    ],
    "scale of 0 and below, where the largest raw score is not the largest scaled one": [
        "gpu/test_forward.py::test_scale",
    ],
    "float16 probabilities that overflow or are denormal": [
        "gpu/test_lazy.py::test_on_both_sides_of_the_edge",
        "gpu/test_lazy.py::test_float16_probabilities_far_below_one",
        "gpu/test_lazy.py::test_small_weights_of_many_keys_add_up",
    ],
    # Sizes.
    "more than 2^31 elements": [
        "gpu/test_forward.py::test_more_than_two_to_the_31_elements_in_one_array",
    ],
    "more than 65535 heads; more tiles than 32 bits count": [
        "gpu/test_forward.py::test_more_than_65535_pairs_of_batch_and_head",
        "cuda/plan_test.cc",
    ],
    "no batch row, no query, no key": ["gpu/test_forward.py::test_empty_problems"],
    "tensor maps: size 0, base of a slice": [
        "gpu/test_forward.py::test_empty_problems",
        "gpu/test_traps.py::test_inputs_and_outputs_that_are_slices_of_larger_arrays",
        "gpu/test_jit_and_graphs.py::test_donated_inputs",
    ],
    # Concurrency.
    "ring phases over tiles of 0 and 1 key blocks; a warpgroup that lets blocks pass": [
        "gpu/test_configurations.py::test_many_tiles_a_cta_with_none_one_and_more_key_blocks",
    ],
    "shared memory given back early; a missing fence": [
        "gpu/test_determinism.py::test_200_runs_have_the_same_bits",
        "../tools/sanitize.py",
    ],
    "a tile counter that a launch or a neighbour on another stream leaves behind": [
        "gpu/test_determinism.py::test_2000_launches_of_varied_shapes_in_random_order",
        "gpu/test_jit_and_graphs.py::test_two_threads_dispatch_at_once",
        "cuda/fwd_device.cu",
    ],
    "CTAs that add in turns: one waits for one that cannot start, or that has nothing to add": [
        "gpu/test_deterministic_backward.py::test_more_key_tiles_than_multiprocessors",
        "gpu/test_deterministic_backward.py::test_offsets_that_leave_keys_without_queries",
    ],
    "a turn that is passed on before its additions have been done": ["cuda/bwd_device.cu"],
    "turns that a launch leaves behind": [
        "gpu/test_deterministic_backward.py::test_1000_launches_of_each_of_three_shapes",
        "gpu/test_deterministic_backward.py::test_a_replayed_step_has_the_same_bits_for_the_same_input",
    ],
    "the same bits in every run, rows that are done again and cut tiles included": [
        "gpu/test_determinism.py::test_200_runs_have_the_same_bits",
        "gpu/test_configurations.py::test_cut_tiles_repeat_bit_for_bit",
    ],
    "setmaxnreg beyond the register file; serialized wgmma; spills in the loop": [
        "../tools/check_kernels.py",
        "cpu/test_check_kernels.py::test_local_memory_needs_a_listed_reason",
    ],
    "command buffers replayed with other buffers": [
        "gpu/test_jit_and_graphs.py::test_a_step_replays_with_changing_inputs",
    ],
    # Numbers.
    "lse in natural logarithm": ["gpu/test_forward.py::test_lse_is_natural_float32_and_by_token"],
    "pieces of a cut tile that weigh nothing, or hold no finite score": [
        "gpu/test_configurations.py::test_tiles_that_are_cut_along_the_keys",
        "cuda/split_test.cc",
    ],
    "results that depend on the rest of the batch": [
        "gpu/test_determinism.py::test_a_row_does_not_depend_on_the_rest_of_the_batch",
    ],
    "a lazy reference that overflows, or is redone where it need not be": [
        "gpu/test_lazy.py::test_rows_that_one_late_key_outweighs_are_done_again_and_no_others",
        "gpu/test_lazy.py::test_scores_that_start_low",
        "gpu/test_lazy.py::test_random_inputs_are_never_done_again",
    ],
    "dominant probabilities that are not exactly 1": [
        "gpu/test_lazy.py::test_peaked_rows_are_as_accurate_as_plain_jax",
    ],
    # Machines.
    "another device than the first": [
        "gpu/test_traps.py::test_every_device_runs_every_head_dim",
    ],
    "a GPU that is no Hopper": [
        "cpu/test_implementations.py::test_a_gpu_that_is_no_hopper_is_logged_once_while_lowering",
    ],
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_has_a_test_by_that_name(trap):
    for where in TRAPS[trap]:
        path, _, name = where.partition("::")
        file = REPOSITORY / "tests" / path
        assert file.exists(), where
        if name:
            assert re.search(rf"^def {name}", file.read_text(), re.MULTILINE), where
