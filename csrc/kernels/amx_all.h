// Everything that a unit with tiles instantiates over its vectors and its class Tiles. Inside the unit's namespace; the
// order matters, as in kernels/all.h.
#include "kernels/unpack.h"
#include "kernels/act_row.h"
#include "kernels/grids.h"
#include "kernels/ternary.h"
#include "kernels/tile.h"
#include "kernels/tile_f32.h"
#include "kernels/tile_bf16.h"
#include "kernels/amx_int8.h"
#include "kernels/amx_bf16.h"
#include "kernels/amx_table.h"
