//! What the suites of other allocators ask of theirs, asked of this one: 68 numbered cases from PyTorch, RMM,
//! CuPy, cubecl and the first Kitsune, run on every device of [`cases`].
//!
//! A case that says something else here than in the suite it comes from says why. A case that is not run
//! stands in [`NOT_RUN`] with the reason; a test counts that each number is somewhere, once. Another device
//! is another [`Subject`](subject::Subject) and another line in [`cases`].

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the cases enqueue work on blocks that live until it has run, and fail by panicking"
)]

#[path = "../driver_support/mod.rs"]
mod driver_support;

mod accounting;
mod devices;
mod limits;
mod pools;
mod shapes;
mod streams;
mod subject;

/// Cases that say nothing about this allocator, or not yet, and why.
const NOT_RUN: [(u8, &str); 23] = [
    (5, "waits for the device fraction in the pool's settings"),
    (6, "waits for the device fraction in the pool's settings"),
    (
        14,
        "there is no switch that turns the cache off: uncached memory is the driver's",
    ),
    (
        17,
        "no stacks are kept: what was allocated where is told by tags",
    ),
    (18, "no stacks are kept"),
    (19, "no trace entries are kept to hang metadata on"),
    (20, "no trace entries are kept to leave out"),
    (
        21,
        "no history is kept that could be pickled; a log in RMM's format is a wrapper's work",
    ),
    (
        22,
        "the state of a private pool is not taken and restored: graphs with trees of branches are not a goal",
    ),
    (23, "as 22"),
    (24, "as 22; a live block is a value that somebody owns"),
    (25, "waits for private pools"),
    (26, "waits for private pools"),
    (27, "waits for private pools"),
    (
        30,
        "no pool borrows from another: idle memory of one is returned by a call on it",
    ),
    (31, "as 30"),
    (
        32,
        "every block may be split: the rest of a page is never lost",
    ),
    (
        34,
        "addresses are not bounded by a setting: there are four times as many as memory",
    ),
    (35, "as 34"),
    (50, "waits for scoped peaks"),
    (51, "waits for scoped peaks"),
    (53, "waits for reclaim callbacks"),
    (64, "waits for private pools"),
];

/// The cases that are run, each on every subject.
macro_rules! cases {
    ($($module:ident { $($case:ident)* })*) => {
        const RUN: &[&str] = &[$($(stringify!($case),)*)*];
        cases!(@on paged, Paged, $($module { $($case)* })*);
        cases!(@on plain, Plain, $($module { $($case)* })*);
    };
    (@on $name:ident, $subject:ident, $($module:ident { $($case:ident)* })*) => {
        mod $name {
            $($(
                #[test]
                fn $case() {
                    crate::$module::$case::<crate::subject::$subject>();
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
        case_12_running_out_is_reported
        case_13_running_out_is_the_same_error_on_every_path
        case_36_limits_below_a_page_and_off_its_multiples
        case_37_growth_is_by_what_is_asked_for
        case_39_the_whole_device_can_be_used
        case_43_what_threads_keep_is_found_when_memory_is_short
        case_52_a_limit_counts_exactly
        case_57_a_fragmented_limit_is_made_whole
    }
    pools {
        case_33_pools_on_one_device_are_apart
        case_40_all_clones_are_one_pool
        case_44_a_block_finds_its_pool_after_its_thread
        case_45_blocks_are_freed_by_a_consumer
        case_61_what_a_thread_frees_another_reuses_on_the_stream
    }
    shapes {
        case_11_contents_survive_random_sequences
        case_41_neighbors_coalesce_in_every_order
        case_42_a_region_freed_in_mixed_order_is_whole
        case_55_a_split_block_merges_back
        case_58_a_block_in_use_keeps_its_segment
        case_66_fragmentation_is_bounded
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
