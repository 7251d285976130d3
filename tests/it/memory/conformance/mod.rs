//! What the suites of other allocators ask of theirs, asked of this one: 68 numbered cases from PyTorch, RMM,
//! CuPy, cubecl and the first Kitsune, run on every device of [`cases`].
//!
//! A case that says something else here than in the suite it comes from says why. A case that is not run
//! stands in [`NOT_RUN`] with the reason; a test counts that each number is somewhere, once. Another device
//! is another [`Subject`](crate::support::subject::Subject) and another line in [`cases`].

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the cases enqueue work on blocks that live until it has run, and fail by panicking"
)]

mod accounting;
mod captures;
mod devices;
mod limits;
mod pools;
mod records;
mod shapes;
mod shortage;
mod streams;

/// Cases that say nothing about this allocator, and why.
const NOT_RUN: [(u8, &str); 4] = [
    (
        18,
        "segments are not in any log: they are the pool's affair, and counted",
    ),
    (
        32,
        "every block may be split: the rest of a page is never lost",
    ),
    (
        34,
        "addresses are not bounded by a setting: there are four times as many as memory",
    ),
    (35, "as 34"),
];

/// The cases that are run, each on every subject.
macro_rules! cases {
    ($($module:ident { $($case:ident)* })*) => {
        const RUN: &[&str] = &[$($(stringify!($case),)*)*];
        cases!(@on paged, Paged, $($module { $($case)* })*);
        cases!(@on plain, Plain, $($module { $($case)* })*);
        #[cfg(all(target_os = "linux", feature = "cuda"))]
        cases!(@on simcuda, SimCuda, $($module { $($case)* })*);
    };
    (@on $name:ident, $subject:ident, $($module:ident { $($case:ident)* })*) => {
        mod $name {
            use crate::support::process::test_name;
            use crate::support::subject::{Subject, $subject};

            $($(
                #[test]
                fn $case() {
                    let name = test_name!(stringify!($case));
                    $subject::run(name, super::$module::$case::<$subject>);
                }
            )*)*
        }
    };
}

cases! {
    accounting {
        case_01_one_byte_is_counted_and_given_back
        case_02_statistics_follow_a_block_through_its_life
        case_07_sizes_are_rounded_to_the_granularity_alone
        case_16_what_is_held_is_where_it_says
        case_46_no_bytes_and_too_many_bytes
        case_47_blocks_are_aligned_and_apart
        case_48_counters_stand_threads_that_pass_addresses_on
        case_49_a_block_gives_back_what_it_took
        case_54_freed_memory_is_kept_until_asked_for
        case_59_used_and_free_bytes_sum_to_what_is_held
        case_60_no_bytes_are_not_pooled
        case_67_size_classes
        case_68_types_and_lengths_are_those_asked_for
    }
    captures {
        case_22_captures_on_one_private_pool_are_laid_out_alike
        case_23_blocks_that_outlive_their_graph_die_one_by_one
        case_24_the_live_blocks_of_a_capture_are_known
        case_25_a_pass_routes_its_own_thread_alone
        case_26_a_forked_stream_holds_a_block_until_the_capture_ends
        case_27_three_forks_hold_a_block_until_the_capture_ends
        case_64_a_graph_pins_what_it_touched_and_nothing_else
    }
    devices {
        case_28_a_pool_takes_all_its_memory_from_its_driver
        case_29_a_block_keeps_the_driver_after_its_pool
        case_38_a_destroyed_stream_leaves_its_memory_usable
        case_62_a_full_pool_refuses_and_another_serves
        case_63_a_live_block_is_unmoved_by_returning_others
        case_65_a_warm_pool_asks_the_driver_for_nothing
    }
    limits {
        case_03_a_request_beyond_any_device_fails_alone
        case_04_what_failed_succeeds_after_a_free
        case_08_bad_settings_are_refused
        case_09_a_full_limit_refuses_and_recovers
        case_10_idle_memory_makes_room_below_a_limit
        case_13_running_out_is_the_same_error_on_every_path
        case_36_limits_below_a_page_and_off_its_multiples
        case_37_growth_is_by_what_is_asked_for
        case_39_the_whole_device_can_be_used
        case_43_what_threads_keep_is_found_when_memory_is_short
        case_52_a_limit_counts_exactly
        case_57_a_fragmented_limit_is_made_whole
    }
    pools {
        case_33_passes_nest_and_pools_are_apart
        case_40_all_clones_are_one_pool
        case_44_a_block_finds_its_pool_after_its_thread
        case_45_blocks_are_freed_by_a_consumer
        case_61_what_a_thread_frees_another_reuses_on_the_stream
    }
    records {
        case_14_memory_of_the_driver_is_not_counted
        case_17_live_blocks_have_stacks_where_asked_for
        case_19_blocks_carry_the_tag_they_were_allocated_under
        case_20_a_sink_may_leave_actions_out
        case_21_table_and_log_have_the_size_that_was_asked_for
        case_50_inner_peaks_fold_into_outer_ones
        case_51_an_inner_scope_goes_below_zero
    }
    shapes {
        case_11_contents_survive_random_sequences
        case_41_neighbors_coalesce_in_every_order
        case_42_a_region_freed_in_mixed_order_is_whole
        case_55_a_split_block_merges_back
        case_58_a_block_in_use_keeps_its_segment
        case_66_fragmentation_is_bounded
    }
    shortage {
        case_05_a_fraction_of_the_device_is_a_limit
        case_06_a_fraction_reads_back
        case_12_running_out_is_told_to_observers
        case_30_one_pool_makes_room_for_another
        case_31_who_is_gone_is_not_asked
        case_53_each_callback_is_asked_once_and_of_shortage_alone
    }
    streams {
        case_15_a_recorded_block_waits_for_the_other_stream
        case_56_a_freed_block_on_another_stream
    }
}

#[test]
fn every_case_is_accounted_for_once() {
    let number = |name: &&str| name["case_".len()..][..2].parse::<u8>().unwrap();
    let run = RUN.iter().map(number);
    let mut all: Vec<u8> = run.chain(NOT_RUN.map(|(number, _)| number)).collect();
    all.sort_unstable();
    assert_eq!(all, (1..=68).collect::<Vec<u8>>());
    assert!(NOT_RUN.iter().all(|(_, reason)| !reason.is_empty()));
}
