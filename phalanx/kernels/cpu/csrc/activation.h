// The gated activations of feed-forward layers.
#pragma once
#include "vec.h"

INLINE vec silu(vec x) { return x / (1.0f + exp(-x)); }

// x/2 (1 + tanh(u)) is x / (1 + e^-2u).
INLINE vec gelu_tanh(vec x) { return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x))); }

// (clamp(up) + 1) * g * sigmoid(alpha * g), g = min(gate, limit). Comparisons are written so that NaN stays NaN.
INLINE vec swiglu_clamped(vec gate, vec up, float alpha, float limit) {
    gate = gate > limit ? broadcast(limit) : gate;
    up = up > limit ? broadcast(limit) : up;
    up = up < -limit ? broadcast(-limit) : up;
    return (up + 1.0f) * gate * sigmoid(alpha * gate);
}
