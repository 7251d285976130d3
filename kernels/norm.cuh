// Kinds of norms, and how parts of one are put together.
#pragma once
#include "reduction.cuh"

// The codes of `NormKind`.
constexpr u32 L1 = 0, L2 = 1, MAX = 2;

// For sums of magnitudes, sums of squares, or largest magnitudes.
struct CombineNorms {
    u32 kind;

    __device__ double operator()(double a, double b) const {
        return kind == MAX ? MaximumOrNan{}(a, b) : a + b;
    }
};
