// activation.cpp: names of activations, and which architectures of llama.cpp have one.
#include "activation.h"

#include <cstring>

struct activation_entry {
    pinfer_activation act;
    const char *      name;
};

static const activation_entry activations[] = {
    {PINFER_ACT_RELU, "relu"},   {PINFER_ACT_RELU2, "relu2"}, {PINFER_ACT_REGLU, "reglu"},
    {PINFER_ACT_DRELU, "drelu"}, {PINFER_ACT_REGLU2, "reglu2"}, {PINFER_ACT_OTHER, "other"}, {PINFER_ACT_GRAPH, "graph"},
};

// Architectures whose graph in llama.cpp has a ReLU-family FFN.
static const activation_entry architectures[] = {
    {PINFER_ACT_RELU2, "arcee"},
    {PINFER_ACT_RELU2, "nemotron"},
    {PINFER_ACT_RELU2, "plm"},
    {PINFER_ACT_RELU2, "jais2"},
    {PINFER_ACT_RELU2, "rwkv6"},
    {PINFER_ACT_RELU2, "rwkv7"},
    {PINFER_ACT_RELU2, "nemotron_h"},
    {PINFER_ACT_RELU2, "nemotron_h_moe"},
    {PINFER_ACT_REGLU, "smallthinker"},
};

const char * pinfer_activation_name(pinfer_activation act) {
    for (const auto & a : activations) {
        if (a.act == act) {
            return a.name;
        }
    }
    return "other";
}

pinfer_activation pinfer_activation_parse(const char * name) {
    for (const auto & a : activations) {
        if (!strcmp(a.name, name)) {
            return a.act;
        }
    }
    return PINFER_ACT_GRAPH;
}

pinfer_activation pinfer_arch_activation(const char * arch) {
    for (const auto & a : architectures) {
        if (!strcmp(a.name, arch)) {
            return a.act;
        }
    }
    return PINFER_ACT_OTHER;
}
