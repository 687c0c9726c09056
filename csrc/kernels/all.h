// Everything that a unit instantiates over its vectors. Inside the unit's namespace; the order matters: each file uses
// the ones before it.
#include "kernels/unpack.h"
#include "kernels/act_row.h"
#include "kernels/grids.h"
#include "kernels/tile.h"
#include "kernels/tile_f32.h"
#include "kernels/tile_bf16.h"
#include "kernels/pointwise.h"
#include "kernels/cache.h"
#include "kernels/attend.h"
#include "kernels/delta.h"
#include "kernels/limits.h"
#include "kernels/table.h"
