// Places in the scaler's journal. src/launch/journal.rs describes them.
#pragma once
#include "dtype.cuh"

constexpr u32 STEPS = 0, SKIPPED = 1, SKIPPED_IN_A_ROW = 2, UPDATES = 3, GROWTHS = 4, BACKOFFS = 5,
              CHANGES = 6, NAN_STEPS = 7, NAN_IN_A_ROW = 8, CALIBRATED = 9, RECENT_SKIPS = 10,
              LAST_GOOD = 11, FLOOR_HITS = 12, NAN_STEPS_SINCE_UPDATE = 13, INF_STEPS_SINCE_UPDATE = 14;
constexpr u32 SCALE_CHANGES = 32, CHANGE_WORDS = 2, CHANGES_START = 24;
constexpr u32 OVERFLOWS = 16, NAMED = 8, NAMED_WORDS = 4, OVERFLOW_HEAD = 8;
constexpr u32 OVERFLOW_WORDS = OVERFLOW_HEAD + NAMED * NAMED_WORDS;
constexpr u32 OVERFLOWS_START = CHANGES_START + SCALE_CHANGES * CHANGE_WORDS;
