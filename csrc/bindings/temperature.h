// The temperature of queries, as named arguments of a block.
#pragma once
#include "bindings/fields.h"
#include "blocks/attention.h"

inline Temperature to_temperature(Fields& f) {
    Temperature t;
    t.scale = f.take("temperature_scale", t.scale);
    t.span = f.take("temperature_span", t.span);
    t.offset = f.take("temperature_offset", t.offset);
    return t;
}
