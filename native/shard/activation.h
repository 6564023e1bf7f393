// activation.h: f_i(x), what the FFN of a model computes from the products of a neuron.
#pragma once

#include "pinfer.h"

struct pinfer_rule {
    bool operator==(const pinfer_rule &) const = default;

    pinfer_activation act = PINFER_ACT_OTHER; // OTHER: nothing is claimed but stacks with experts on devices
    float threshold = 0.0f; // a product fires where it exceeds this (FATReLU); >= 0
};

inline bool pinfer_is_gated(pinfer_activation act) {
    return act == PINFER_ACT_REGLU || act == PINFER_ACT_DRELU || act == PINFER_ACT_REGLU2;
}

// ReLU with a threshold: what does not exceed it is zero.
inline float pinfer_relu(float v, float threshold) {
    return v > threshold ? v : 0.0f;
}

// f_i(x) from the gate product g and the up product u; where the FFN has no gate, u is g.
inline float pinfer_activate(const pinfer_rule & rule, float g, float u) {
    const float gate = pinfer_relu(g, rule.threshold);
    switch (rule.act) {
        case PINFER_ACT_RELU2:
            return gate * gate;
        case PINFER_ACT_REGLU:
            return gate * u;
        case PINFER_ACT_REGLU2:
            return gate * gate * u;
        case PINFER_ACT_DRELU:
            return gate * pinfer_relu(u, rule.threshold);
        default:
            return gate;
    }
}
